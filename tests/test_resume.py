"A run that is killed, stopped or interrupted anywhere and started again ends as one that was not."
import os, signal, subprocess, sys, textwrap
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = textwrap.dedent('''
    import os, signal, sys, torch
    from torch import nn
    from torch.nn import functional as F
    import protonb.training as T
    from protonb.core import rng_for

    where, die, how, workers = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    cfg = T.Train(steps=14, batch_size=4, seed=3, workers=workers, device='cpu', log_every=3, checkpoint_every=5)

    class Noise(torch.utils.data.Dataset):
        def __init__(self, first): self.first = first
        def __len__(self): return (cfg.steps - self.first)*cfg.batch_size
        def __getitem__(self, i):
            rng = rng_for(cfg.seed, 'noise', self.first*cfg.batch_size + i)
            x = torch.from_numpy(rng.standard_normal((3, 8, 8), dtype='float32'))
            return x, (x.mean(0) > 0).long()

    def batches(first): return torch.utils.data.DataLoader(Noise(first), cfg.batch_size, num_workers=workers)

    T.seed_everything(cfg.seed, 'init')
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.3), nn.Conv2d(8, 2, 1))
    opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9, weight_decay=1e-4)
    sched = T.poly_lr(opt, cfg.steps)
    seen = {'steps': 0}

    def step(batch):
        x, y = batch
        loss = F.cross_entropy(net(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        seen['steps'] += 1
        if seen['steps'] == die and how in ('SIGKILL', 'SIGTERM', 'SIGINT'): os.kill(os.getpid(), getattr(signal, how))
        if seen['steps'] == die and how == 'group': os.killpg(os.getpgid(0), signal.SIGTERM)
        if seen['steps'] == die and how == 'ctrl-c': os.killpg(os.getpgid(0), signal.SIGINT)
        return dict(loss=loss.detach(), **(dict(late=loss.detach()*2) if seen['steps'] > 6 else {}))

    if how == 'writing':                    # dies in the checkpoint of step `die`, between its first and second file
        real, count = T.safetensors.torch.save_file, [0]
        def save_file(*args, **kw):
            count[0] += 1
            if seen['steps'] == die and count[0] % 2 == 0: os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kw)
        T.safetensors.torch.save_file = save_file

    print(T.fit(step, batches, dict(net=net, opt=opt, sched=sched, seen=seen), cfg, run_dir=where, config=dict(lr=.1), progress=False))
''')

def start(tmp, name, die=0, how='-', workers=0):
    script = tmp/'script.py'
    script.write_text(SCRIPT)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.run([sys.executable, script, tmp/name, str(die), how, str(workers)], env=env, capture_output=True, text=True,
                          timeout=120, start_new_session=True)

def tensors(run): return {f.name: load_file(f) for f in sorted((run/'checkpoints'/'train-0000014').glob('*.safetensors'))}

def same(a, b):
    assert (a/'metrics.csv').read_bytes() == (b/'metrics.csv').read_bytes()
    want, got = tensors(a), tensors(b)
    assert want.keys() == got.keys() and {'net.safetensors', 'opt.safetensors', 'loop.safetensors'} <= want.keys()
    for file in want:
        assert want[file].keys() == got[file].keys()
        for name, t in want[file].items(): assert t.dtype == got[file][name].dtype and t.equal(got[file][name]), (file, name)
    assert (a/'checkpoints'/'train-0000014'/'state.json').read_bytes() == (b/'checkpoints'/'train-0000014'/'state.json').read_bytes()
    assert not list(b.rglob('*.tmp'))

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('resume')
    r = start(tmp, 'whole')
    assert r.returncode == 0 and "'step': 14, 'finished': True" in r.stdout, r.stderr
    return tmp

@pytest.mark.parametrize('how, die, workers, left', [
    ('SIGKILL', 7, 0, 5), ('writing', 10, 0, 5), ('SIGTERM', 7, 0, 7), ('SIGINT', 8, 0, 8), ('group', 7, 2, 7), ('ctrl-c', 4, 1, 4)])
def test_stop_and_go(whole, how, die, workers, left):
    name = f'{how}-{workers}'
    killed = start(whole, name, die, how, workers)
    run = whole/name
    assert killed.returncode == (-signal.SIGKILL if how in ('SIGKILL', 'writing') else 0), killed.stderr
    if killed.returncode == 0:
        assert f"'step': {left}, 'finished': False" in killed.stdout
        assert killed.stderr == ''
    newest = sorted(p.name for p in (run/'checkpoints').iterdir() if not p.name.startswith('.'))[-1]
    assert newest == f'train-{left:07d}'
    assert bool(list(run.rglob('*.tmp'))) == (how == 'writing')
    again = start(whole, name, workers=workers)
    assert again.returncode == 0 and "'step': 14, 'finished': True" in again.stdout, again.stderr
    assert again.stderr == ''
    if not workers: same(whole/'whole', run)
    else: assert (whole/'whole'/'metrics.csv').read_bytes() == (run/'metrics.csv').read_bytes()
    once_more = start(whole, name, die=1, how='SIGKILL')
    assert once_more.returncode == 0 and 'True' in once_more.stdout   # finished: no step is run
