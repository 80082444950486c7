"""The fast pixel losses as the methods had them before they became operations: what the bits are compared with."""
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from protonb.distance import collect_band, narrow_band, resized_bands
from protonb.labels import IGNORE
from protonb.pooling import full_precision

TERMS = 'importance', 'symmetric', 'enhanced', 'entropy'


def IAPC(**change):
    return SimpleNamespace(**(dict(importance=.2, symmetric=.04, enhanced=.5, entropy=2., importance_on='logits') | change))


def slopes(
    e,        # (...,H,W)
)->Tensor:    # The same shape
    "Length of the gradient by central differences, zeros outside."
    wide = F.pad(e, (1, 1, 1, 1))
    dx,dy = (wide[...,1:-1,2:] - wide[...,1:-1,:-2])/2,(wide[...,2:,1:-1] - wide[...,:-2,1:-1])/2
    return (dx*dx + dy*dy + 1e-6).sqrt()

def noisy_softmax(
    z,         # (K,H,W) logits
    noise,     # (K,H,W) uniform in 0..1
    tau=.5,    # Temperature
)->Tensor:     # (K,H,W)
    "Softmax of logits with Gumbel noise, as released: the two 1e-10 belong to it."
    return ((z - (1e-10 - (noise+1e-10).log()).log())/tau).softmax(0)

def _whole(seen):
    "Pixels whose stencil has labels everywhere; beyond the edge of the image nothing is missing."
    wide = F.pad(seen, (1, 1, 1, 1), value=True)
    return seen & wide[1:-1,2:] & wide[1:-1,:-2] & wide[2:,1:-1] & wide[:-2,1:-1]

def _outlines(z, y, generator, tau, mask):
    "Of one image: slopes of its noisy probabilities and of its labels, and where they count."
    seen = y != IGNORE
    p = noisy_softmax(z*seen, torch.rand(z.shape, device=z.device, generator=generator), tau)
    t = F.one_hot(y*seen, len(z)).permute(2, 0, 1).to(p.dtype)
    return slopes(p), slopes(t), _whole(seen) if mask else torch.ones_like(seen)

def _again(device, state):
    "A generator that draws once more what another drew from this state on."
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator

def _edge_value(z, y, generator, tau, mask):
    "Sum of the differences, and what its gradient needs: number of terms, both maxima, slope towards the first, states."
    top,total,count,ties,slope,states = z.new_zeros(2),*z.new_zeros(4),[]
    for one,label in zip(z, y):
        states.append(generator.get_state())
        p,t,on = _outlines(one, label, generator, tau, mask)
        top = torch.maximum(top, torch.stack([(p*on).amax(), (t*on).amax()]))
    top = top.clamp(min=1e-12)
    for one,label,state in zip(z, y, states):
        p,t,on = _outlines(one, label, _again(z.device, state), tau, mask)
        gap = (p/top[0] - t/top[1])*on
        total,count,ties = total+gap.abs().sum(),count+on.sum()*len(p),ties+(p*on == top[0]).sum()
        slope = slope - (gap.sign()*p).sum()/top[0]**2      # the strongest outline divides all others
    return total, count.clamp(min=1), top, slope/ties.clamp(min=1), states

def _edge_gradient(z, y, state, top, slope, tau, mask):
    "Of the sum towards the logits of one image."
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        p,t,on = _outlines(z, y, _again(z.device, state), tau, mask)
    return torch.autograd.grad(p, z, ((p/top[0] - t/top[1]).sign()/top[0] + slope*(p == top[0]))*on)[0]

class _EdgeLoss(torch.autograd.Function):
    "Twice over the images for the value, once more for the gradient; maps of one image at a time, the noise drawn anew."
    @staticmethod
    def forward(ctx, z, y, generator, tau, mask):
        total,count,top,slope,states = _edge_value(z, y, generator, tau, mask)
        ctx.save_for_backward(z, y, count, top, slope)
        ctx.how = states, tau, mask
        return total/count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (z,y,count,top,slope),(states,*how) = ctx.saved_tensors,ctx.how
        return torch.stack([_edge_gradient(*one, top, slope, *how) for one in zip(z, y, states)])*(g/count), *[None]*4

def edge_loss(
    logits,         # (B,K,H,W) at label resolution
    labels,         # (B,H,W), 255 = unlabelled
    generator,      # torch.Generator on the device of the logits
    tau=.5,         # Temperature of the noisy softmax
    ignore='road',  # Unlabelled pixels are class 0 with flat logits ('road', released), or left out ('mask')
)->Tensor:          # 0-d
    "Mean difference between the outlines of the prediction and of the labels, each divided by its strongest, as released."
    return _EdgeLoss.apply(logits.float(), labels, generator, tau, ignore == 'mask')


def importance(
    logits,  # (K,...) of the source model, classes first
    cfg,# importance_on
)->Tensor:   # (...)
    "1 - second/first of the two best values at each pixel."
    best = (logits.softmax(0) if cfg.importance_on == 'probs' else logits).topk(2, dim=0).values
    w = 1 - best[1]/best[0]
    return w.clamp(0, 1) if cfg.importance_on == 'clamped' else w


def band_terms(
    z,         # (K,R,W) logits of a band, enlarged; overwritten by their gradient
    z_source,  # (K,R,W) of the source model
    y, y_p,    # (R,W) pseudo labels and prototype labels
    omega,     # (K,) class weights
    cfg,  # Weights of the terms
)->Tensor:     # (4,) sums of `TERMS` over the band; `z` then holds the gradient of their weighted sum
    "Losses and gradient of a band, from one softmax."
    keep,at = y < len(z),y.clamp(max=len(z)-1)[None]
    logp = F.log_softmax(z, 0)
    w,agree = omega[at[0]]*keep,y == y_p
    nll,nll_p,W = -logp.gather(0, at)[0],-logp.gather(0, y_p[None])[0],importance(z_source, cfg)
    p = torch.exp(logp, out=z)
    log = torch.log(p+1e-5)
    terms = torch.stack([(W*w*nll).sum(), nll_p.sum(), (w*nll*agree).sum(), -(p*log).sum()])
    slope = log.add_(p/(p+1e-5))                                # of the entropy towards p, but for the sign
    slope -= (p*slope).sum(0)
    one,two = w*(cfg.importance*W + cfg.enhanced*agree),torch.full_like(w, cfg.symmetric)
    p.mul_((one+two) - cfg.entropy*slope)
    p.scatter_add_(0, at, -one[None]).scatter_add_(0, y_p[None], -two[None])
    return terms

class _PixelTerms(torch.autograd.Function):
    "Weighted sum of the four terms, the terms, and the student's labels; nothing of size (B,K,H,W) is ever stored."
    @staticmethod
    def forward(ctx, z, z_source, y, y_p, omega, cfg):
        (B,K,h,w),(H,W) = z.shape,y.shape[1:]
        big,own = z.float(),torch.empty_like(y)
        terms,dz = big.new_zeros(len(TERMS)),torch.empty_like(big)
        for (b,r,e,up,wy,rows),(*_,sure,_,_) in zip(resized_bands(big, H, W), resized_bands(z_source.float(), H, W)):
            if r == 0: dcols = up.new_zeros(K, h, W)
            own[b,r:e] = up.argmax(0)
            terms += band_terms(up, sure, y[b,r:e], y_p[b,r:e], omega, cfg)
            collect_band(up, wy, rows, dcols)
            if e == H: dz[b] = narrow_band(dcols, w, up.dtype)
        terms,weights = terms/y.numel(),torch.tensor([getattr(cfg, t) for t in TERMS], device=z.device)
        ctx.save_for_backward((dz/y.numel()).to(z.dtype))
        ctx.mark_non_differentiable(terms, own)
        return (terms*weights).sum(), terms, own

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, *_): return ctx.saved_tensors[0]*g, None, None, None, None, None

def pixel_terms(
    z,         # (B,K,h,w) logits of the student
    z_source,  # (B,K,h,w) logits of the source model
    y, y_p,    # (B,H,W) pseudo labels and prototype labels
    omega,     # (K,) class weights
    cfg,  # Weights of the terms
)->tuple:      # their weighted sum, the `TERMS` (4,) without gradient, the student's labels (B,H,W)
    "Everything that looks at the enlarged logits, band by band."
    with full_precision(z): return _PixelTerms.apply(z, z_source, y, y_p, omega, cfg)


class _Through(torch.autograd.Function):
    "The verdict, with a way back to the probabilities only."
    @staticmethod
    def forward(ctx, p, judged):          # a tuple, so that autograd sees `p` alone
        ctx.judged = judged
        return judged[1].detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        seen,verdict = ctx.judged
        return torch.autograd.grad(verdict, seen, g, retain_graph=True)[0], None

def judge(
    disc,      # (B,K,H,W) -> (B,1,h,w)
    p,         # (B,K,H,W) probabilities with the graph of the network
)->tuple:      # fooled, verdict: the same numbers, (B,1,h,w)
    "One forward of a discriminator for two backwards; that of `verdict` is to name the weights as its `inputs`."
    seen = p.detach().requires_grad_()
    verdict = disc(seen)
    return _Through.apply(p, (seen, verdict)), verdict
