"The training loop: states as files, logs, configuration, faults, several processes. Restarts are in test_resume.py."
import json, math, os, random, re, shutil, signal, subprocess, sys, textwrap, threading, warnings
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn
from torch.optim import lr_scheduler as S

import protonb.training as T
from protonb.core import InputError
from protonb.training import Train, fit, load_checkpoint, pack, poly_lr, read_metrics, read_states, save_checkpoint, unpack

CFG = Train(steps=12, batch_size=2, device='cpu', log_every=2, checkpoint_every=4)

def toy(cfg=CFG, opt=torch.optim.SGD, value=None, lr=.1, **kw):
    "step, make_batches, parts of a linear regression; `value(t, loss)` changes what is logged"
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    opt = opt(net.parameters(), lr=lr, **kw)
    sched = poly_lr(opt, cfg.steps)
    def step(batch):
        t, x = batch
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        return value(t, loss.detach()) if value else dict(loss=loss.detach())
    def batches(first): return ((t, torch.randn(2, 3, generator=torch.Generator().manual_seed(t))) for t in range(first, cfg.steps))
    return step, batches, dict(net=net, opt=opt, sched=sched)

def go(folder, cfg=CFG, config=None, stage='train', progress=False, **kw):
    step, batches, parts = toy(cfg, **kw)
    return fit(step, batches, parts, cfg, run_dir=folder, stage=stage, config=config, progress=progress), parts

def there(folder): return sorted(p.name for p in (folder/'checkpoints').iterdir())

# ---- states as files

def deep_equal(a, b):
    assert type(a) is type(b), (type(a), type(b))
    if isinstance(a, torch.Tensor): assert a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    elif isinstance(a, np.ndarray): assert a.dtype == b.dtype and np.array_equal(a, b)
    elif isinstance(a, dict):
        assert [(type(k), k) for k in a] == [(type(k), k) for k in b]
        for k in a: deep_equal(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b): deep_equal(x, y)
    else: assert a == b or (a != a and b != b)

def through_disk(state, tmp_path):
    save_checkpoint(tmp_path/'c', dict(part=state))
    return read_states(tmp_path/'c')['part']

def test_every_type_comes_back(tmp_path):
    wide = torch.arange(12.).reshape(3, 4)
    state = {'t': wide.T, 'view': wide[1], 'zero-d': torch.tensor(3), 'empty': torch.zeros(0, 2), 'bool': torch.tensor([True]),
             'half': torch.ones(2, dtype=torch.bfloat16), 'last': torch.ones(1, 2, 2, 2).to(memory_format=torch.channels_last),
             0: 'int key', '0': 'str key', None: 1, (1, 'a'): [2], 1.5: 3, '$tensor': 'not a tensor', 'a.b': wide, 'a': {'b': wide+1},
             'n': None, 'yes': True, 'one': 1, 'big': 2**70, 'x': .1, 'inf': -math.inf, 'nan': math.nan, 'tiny': 5e-324, 'text': 'ä"\n',
             'list': [], 'tuple': (), 'nested': ((1, [2, (3,)]), {}), 'counter': Counter({3: 2}), 'array': np.arange(3, dtype=np.uint32),
             'scalar': np.float32(.1), 'marked': {'$float': 'x'}}
    deep_equal(through_disk(state, tmp_path), state)

def test_ordered_dicts_become_dicts_and_other_things_are_refused(tmp_path):
    deep_equal(through_disk(OrderedDict(a=1), tmp_path), {'a': 1})
    with pytest.raises(TypeError, match=r'deep\.1 is a function'): pack({'deep': [1, print_nothing]}, {})

def print_nothing(): pass

def test_shared_memory_is_stored_twice(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    assert len(through_disk(net.state_dict(), tmp_path)) == 4

@pytest.mark.parametrize('make', [
    lambda p: torch.optim.SGD(p, lr=.1, momentum=.9, nesterov=True), lambda p: torch.optim.Adam(p, amsgrad=True),
    lambda p: torch.optim.AdamW([dict(params=p, lr=.1), dict(params=[nn.Parameter(torch.ones(2))], weight_decay=0.)]),
    lambda p: torch.optim.RMSprop(p, centered=True), lambda p: torch.optim.Adafactor(p)],
    ids=['sgd', 'adam', 'adamw', 'rmsprop', 'adafactor'])
def test_optimizers(make, tmp_path):
    def build():
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        return net, make(list(net.parameters()))
    def steps(net, opt, n):
        for i in range(n):
            opt.zero_grad()
            net(torch.full((1, 3), i+1.)).square().sum().backward()
            opt.step()
    net, opt = build()
    steps(net, opt, 3)
    deep_equal(through_disk(opt.state_dict(), tmp_path), opt.state_dict())
    save_checkpoint(tmp_path/'d', dict(net=net, opt=opt))
    other, again = build()
    load_checkpoint(tmp_path/'d', dict(net=other, opt=again))
    steps(net, opt, 3)
    steps(other, again, 3)
    assert other.weight.equal(net.weight)

@pytest.mark.parametrize('make', [
    lambda o: poly_lr(o, 20), lambda o: S.SequentialLR(o, [S.LinearLR(o, .1, total_iters=4), poly_lr(o, 16)], [4]),
    lambda o: S.MultiStepLR(o, [3, 9]), lambda o: S.OneCycleLR(o, .1, 20), lambda o: S.CosineAnnealingWarmRestarts(o, 5),
    lambda o: S.ChainedScheduler([S.ConstantLR(o), S.ExponentialLR(o, .9)])],
    ids=['poly', 'warm-up', 'multistep', 'onecycle', 'cosine', 'chained'])
def test_schedulers(make, tmp_path):
    def build():
        opt = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=.1, momentum=.9)
        return opt, make(opt)
    def rates(opt, sched, n):
        out = []
        for _ in range(n):
            out.append(opt.param_groups[0]['lr'])
            opt.step()
            sched.step()
        return out
    want = rates(*build(), 19)
    first = build()
    rates(*first, 7)
    save_checkpoint(tmp_path/'c', dict(opt=first[0], sched=first[1]))
    second = build()
    load_checkpoint(tmp_path/'c', dict(opt=second[0], sched=second[1]))
    assert rates(*second, 12) == want[7:]

def test_poly_lr_counts_from_one_and_treats_groups_alike():
    opt = torch.optim.SGD([dict(params=[nn.Parameter(torch.ones(1))]) for _ in range(6)], lr=.01)
    sched, seen = poly_lr(opt, 50), []
    for _ in range(50):
        seen.append([g['lr'] for g in opt.param_groups])
        opt.step()
        sched.step()
    assert all(len(set(r)) == 1 for r in seen)
    assert [r[0] for r in seen] == pytest.approx([.01*(1 - t/50)**.9 for t in range(1, 51)], rel=1e-12)
    assert seen[-1][0] == 0 and opt.param_groups[0]['lr'] == 0      # and it stays there, no power of a negative number

def test_checkpoint_names_are_those_of_the_bare_network(tmp_path):
    net = nn.Linear(2, 2)
    wrapped = nn.DataParallel(torch.compile(net))
    save_checkpoint(tmp_path/'c', dict(net=wrapped))
    assert list(read_states(tmp_path/'c')['net']) == ['weight', 'bias']
    load_checkpoint(tmp_path/'c', dict(net=wrapped))

def test_a_plain_dict_is_a_part(tmp_path):
    save_checkpoint(tmp_path/'c', dict(count={'seen': 3}))
    count = {'old': 1}
    load_checkpoint(tmp_path/'c', dict(count=count))
    assert count == {'seen': 3}

def test_loaded_tensors_do_not_hang_on_the_file(tmp_path):
    save_checkpoint(tmp_path/'c', dict(part={'t': torch.arange(1000.)}))
    t = read_states(tmp_path/'c')['part']['t']
    (tmp_path/'c'/'part.safetensors').write_bytes(b'\0'*(tmp_path/'c'/'part.safetensors').stat().st_size)
    assert t.equal(torch.arange(1000.))

# ---- faults

def test_nothing_is_loaded_from_a_checkpoint_that_cannot_be_read_in_full(tmp_path):
    save_checkpoint(tmp_path/'c', dict(a=nn.Linear(2, 2), b=nn.Linear(2, 2)))
    file = tmp_path/'c'/'b.safetensors'
    file.write_bytes(b'x'*file.stat().st_size)                     # the right length, the wrong content
    net = nn.Linear(2, 2)
    before = net.weight.clone()
    with pytest.raises(InputError, match='c: damaged checkpoint'): load_checkpoint(tmp_path/'c', dict(a=net, b=nn.Linear(2, 2)))
    assert net.weight.equal(before)

@pytest.mark.parametrize('harm', [
    lambda p: (p/'net.safetensors').write_bytes((p/'net.safetensors').read_bytes()[:-3]), lambda p: (p/'opt.safetensors').unlink(),
    lambda p: (p/'state.json').write_text('{'), lambda p: (p/'checkpoint.json').write_text(''), lambda p: (p/'checkpoint.json').unlink(),
    lambda p: (p/'checkpoint.json').write_text('[1]'), lambda p: (p/'net.safetensors').write_bytes(b'')],
    ids=['short', 'gone', 'state', 'info empty', 'info gone', 'info odd', 'empty'])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(harm, tmp_path):
    _, whole = go(tmp_path/'whole', opt=torch.optim.AdamW)
    go(tmp_path/'hurt', opt=torch.optim.AdamW)
    harm(tmp_path/'hurt'/'checkpoints'/'train-0000012')
    with pytest.warns(UserWarning, match='train-0000012.*going back to the one before'):
        end, parts = go(tmp_path/'hurt', opt=torch.optim.AdamW)
    assert end == dict(step=12, finished=True) and parts['net'].weight.equal(whole['net'].weight)
    assert (tmp_path/'hurt'/'metrics.csv').read_bytes() == (tmp_path/'whole'/'metrics.csv').read_bytes()
    assert T.checkpoint_info(tmp_path/'hurt')['step'] == 12         # made anew in the same place

def test_no_whole_checkpoint_left_is_an_error_and_not_a_fresh_start(tmp_path):
    go(tmp_path)
    for p in (tmp_path/'checkpoints').iterdir(): (p/'net.safetensors').unlink()
    with warnings.catch_warnings(), pytest.raises(InputError, match='none of stage train is whole'):
        warnings.simplefilter('ignore')
        go(tmp_path)
    with pytest.raises(InputError, match='has no whole checkpoint'): T.checkpoint_info(tmp_path)

def test_leftovers_of_a_kill_are_removed_and_never_taken_for_checkpoints(tmp_path):
    left = tmp_path/'checkpoints'/'.train-0000008.abc.tmp'/'train-0000008'
    left.mkdir(parents=True)
    (tmp_path/'.metrics.csv.xyz.tmp').mkdir()
    assert go(tmp_path)[0]['finished']
    assert not list(tmp_path.rglob('*.tmp')) and not list(tmp_path.rglob('.*'))

def test_other_parts_are_refused_by_name(tmp_path):
    go(tmp_path)
    step, batches, parts = toy()
    with pytest.raises(InputError, match='holds the parts net, opt, sched, but this run has net, opt'):
        fit(step, batches, dict(net=parts['net'], opt=parts['opt']), CFG, run_dir=tmp_path, progress=False)
    with pytest.raises(InputError, match='its part net does not fit'): load_checkpoint(tmp_path, dict(net=nn.Linear(2, 2)))

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_divergence_stops_before_it_is_saved(bad, tmp_path):
    with pytest.raises(T.Diverged, match=rf'stage train diverged at step 7 \(aux is {bad}\); the last checkpoint is of step 4'):
        go(tmp_path, value=lambda t, loss: dict(loss=loss, aux=loss*0 + (bad if t == 6 else 0)))
    assert there(tmp_path) == ['train-0000004']
    assert read_metrics(tmp_path)['loss'][0] == [2, 4, 6]

def test_divergence_between_two_rows_does_not_reach_a_checkpoint(tmp_path):
    cfg = replace(CFG, log_every=5)
    with pytest.raises(T.Diverged, match='step 7'): go(tmp_path, cfg, value=lambda t, loss: dict(loss=loss/(t != 6)))
    assert there(tmp_path) == ['train-0000004']

def test_too_few_batches(tmp_path):
    step, batches, parts = toy()
    with pytest.raises(ValueError, match='make_batches ended after step 5 of 12'):
        fit(step, lambda first: (b for b in batches(first) if b[0] < 5), parts, CFG, run_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match='ended after step 0'):
        fit(step, lambda first: [], parts, CFG, run_dir=tmp_path/'b', progress=False)

def test_odd_names_and_values(tmp_path):
    step, batches, parts = toy()
    with pytest.raises(InputError, match="stage is 'a/b'"): fit(step, batches, parts, CFG, run_dir=tmp_path, stage='a/b')
    with pytest.raises(ValueError, match="part 'loop'"): fit(step, batches, dict(loop=parts['net']), CFG, run_dir=tmp_path)
    with pytest.raises(ValueError, match=r'step returned loss of shape \(1,\)'):
        go(tmp_path/'c', value=lambda t, loss: dict(loss=loss[None]))
    with pytest.raises(ValueError, match="named 'step'"): go(tmp_path/'d', value=lambda t, loss: dict(step=loss))
    with pytest.raises(TypeError, match='cannot be written to config.json'): go(tmp_path/'e', config=dict(f=print_nothing))
    for kw in dict(steps=0), dict(keep=0), dict(device='gpu'), dict(precision='fp32'):
        with pytest.raises(InputError, match=next(iter(kw))): Train(**kw)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match='no GPU'): T.accelerator_for(Train(device='cuda'))

# ---- configuration

def test_a_config_of_something_else(tmp_path):
    for text in '{', '[1]':
        (tmp_path/'config.json').write_text(text)
        with pytest.raises(InputError, match='not the config.json of a run'): go(tmp_path)

@dataclass
class Method:
    lr: float = .1
    sizes: tuple = (1, 2)
    where: Path = Path('a')

def test_another_configuration_is_refused_with_old_and_new_values(tmp_path):
    go(tmp_path, config=Method())
    assert go(tmp_path, config=Method())[0]['finished']             # tuples and paths compare equal after JSON
    before = (tmp_path/'config.json').read_bytes()
    with pytest.raises(InputError, match=r'config\.lr 0\.1 -> 0\.2, config\.where \'a\' -> \'b\''):
        go(tmp_path, config=Method(.2, where=Path('b')))
    for change, told in [(dict(steps=13), 'train.steps 12 -> 13'), (dict(seed=1), 'train.seed 0 -> 1'),
                         (dict(batch_size=4), 'effective_batch 2 -> 4'), (dict(precision='bf16'), "train.precision 'no' -> 'bf16'")]:
        with pytest.raises(InputError, match=told): go(tmp_path, replace(CFG, **change), config=Method())
    assert (tmp_path/'config.json').read_bytes() == before
    go(tmp_path, replace(CFG, workers=1, log_every=3, checkpoint_every=7, keep=5, device='auto'), config=Method())
    assert json.loads((tmp_path/'config.json').read_text())['train']['train']['keep'] == 5

def test_config_and_checkpoint_say_what_was_run(tmp_path):
    go(tmp_path, config=Method())
    info, config = T.checkpoint_info(tmp_path), json.loads((tmp_path/'config.json').read_text())['train']
    for told in info, config:
        assert told['config'] == dict(lr=.1, sizes=[1, 2], where='a') and told['train']['seed'] == 0
        assert told['effective_batch'] == 2 and told['batch'] == dict(batch_size=2, processes=1, accumulation=1)
        assert torch.__version__.startswith(told['versions']['torch'])
        assert {'python', 'numpy', 'protonb', 'accelerate'} < told['versions'].keys()
        assert told['versions']['threads'] == torch.get_num_threads() and told['versions']['blas'] and '(' in told['versions']['processor']
    assert info['stage'] == 'train' and info['step'] == 12

def test_other_versions_or_another_machine_give_a_warning(tmp_path):
    go(tmp_path)
    path, begun = tmp_path/'config.json', json.loads((tmp_path/'config.json').read_text())
    for name, was in dict(torch='1.0', processor='Abacus (beads)', blas='fingers', threads=64).items():
        config = json.loads(json.dumps(begun))
        config['train']['versions'][name] = was
        path.write_text(json.dumps(config))
        with pytest.warns(UserWarning, match=re.escape(f'begun elsewhere: {name} {was} ->')): go(tmp_path)
    for name in 'processor', 'blas': del config['train']['versions'][name]          # a folder of before they were noted
    config['train']['versions']['threads'] = torch.get_num_threads()
    path.write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        go(tmp_path)

# ---- logs

def test_rows_are_means_and_late_names_get_a_column(tmp_path):
    cfg = replace(CFG, steps=5)
    go(tmp_path, cfg, value=lambda t, loss: dict(t=torch.tensor(t), half=t/2, **(dict(late=torch.tensor(t*1.)) if t >= 3 else {})))
    assert (tmp_path/'metrics.csv').read_text().splitlines() == [
        'stage,step,lr,t,half,late', f'train,2,{.1*.6**.9:.9g},0.5,0.25,', f'train,4,{.1*.2**.9:.9g},2.5,1.25,3', 'train,5,0,4,2,4']
    timing = T.read_rows(tmp_path/'timing.csv')
    assert [r['step'] for r in timing] == ['2', '4', '5'] and all(float(r['samples_per_second']) > 0 for r in timing)

def test_a_value_that_changes_in_place_later_is_logged_as_it_was(tmp_path):
    counter = torch.zeros(())
    go(tmp_path, value=lambda t, loss: dict(count=counter.add_(1)))
    assert read_metrics(tmp_path)['count'] == ([2, 4, 6, 8, 10, 12], [1.5, 3.5, 5.5, 7.5, 9.5, 11.5])

def test_two_optimizers_two_rates(tmp_path):
    step, batches, parts = toy()
    fit(step, batches, {**parts, 'disc': torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=.5)}, CFG, run_dir=tmp_path, progress=False)
    assert set(read_metrics(tmp_path)) == {'lr_opt', 'lr_disc', 'loss'} and read_metrics(tmp_path)['lr_disc'][1] == [.5]*6

def test_no_step_waits_for_the_device_between_rows(tmp_path, monkeypatch):
    asked = []
    for name in 'item', 'tolist', '__float__', '__bool__':
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, real=real, name=name: (asked.append(name), real(self, *a))[1])
    step, batches, parts = toy(replace(CFG, steps=100))
    def quiet(batch):                                               # what torch's own optimizer asks is not ours
        before = len(asked)
        out = step(batch)
        del asked[before:]
        return out
    fit(quiet, batches, parts, replace(CFG, steps=100, log_every=50, checkpoint_every=100), run_dir=tmp_path, progress=False)
    assert 0 < len(asked) < 20, asked

def test_a_log_cut_short_or_not_a_log(tmp_path):
    (tmp_path/'a.csv').write_text('stage,step,loss\ntrain,1,2\ntrain,2')
    assert T.read_rows(tmp_path/'a.csv') == [dict(stage='train', step='1', loss='2')]
    (tmp_path/'metrics.csv').write_text('a,b\n1,2\n')
    with pytest.raises(InputError, match='metrics.csv.*begins with stage,step'): read_metrics(tmp_path)
    assert read_metrics(tmp_path/'nowhere') == {}

# ---- stages, keeping, signals, generators

def test_stages_follow_each_other(tmp_path):
    for stage in 'one', 'two': assert go(tmp_path, stage=stage)[0]['finished']
    assert there(tmp_path) == ['one-0000008', 'one-0000012', 'two-0000008', 'two-0000012']
    assert read_metrics(tmp_path)['loss'][0] == [2, 4, 6, 8, 10, 12]*2 and len(read_metrics(tmp_path, 'two')['loss'][0]) == 6
    assert T.latest_checkpoint(tmp_path).name == 'two-0000012' and T.latest_checkpoint(tmp_path, 'one').name == 'one-0000012'
    before = (tmp_path/'metrics.csv').read_bytes()
    for p in (tmp_path/'checkpoints').glob('two-*'): shutil.rmtree(p)
    go(tmp_path, stage='one', value=lambda t, loss: 1/0)            # finished: not one step
    go(tmp_path, stage='two')
    assert (tmp_path/'metrics.csv').read_bytes() == before

def test_what_a_stage_draws_does_not_depend_on_what_ran_before(tmp_path):
    draw = lambda t, loss: dict(torch=torch.rand(()), python=random.random(), numpy=np.random.rand())
    go(tmp_path/'a', value=draw)
    torch.rand(17), random.random(), np.random.rand(3)
    go(tmp_path/'b', value=draw)
    go(tmp_path/'c', value=draw, stage='other')
    a, b, c = ({k: v for k, v in read_metrics(tmp_path/n).items() if k != 'lr'} for n in 'abc')
    assert a == b and all(a[k] != c[k] for k in a)

@pytest.mark.parametrize('keep, want', [(1, [12]), (3, [4, 8, 12]), (9, [4, 8, 12])])
def test_keep(keep, want, tmp_path):
    go(tmp_path, replace(CFG, keep=keep))
    assert there(tmp_path) == [f'train-{t:07d}' for t in want]

def test_handlers_are_put_back_also_after_an_error(tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(ZeroDivisionError): go(tmp_path, value=lambda t, loss: 1/0)
    go(tmp_path)
    assert ([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], signal.pthread_sigmask(signal.SIG_BLOCK, [])) == before

def test_the_second_interrupt_interrupts(tmp_path):
    def twice(t, loss):
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): go(tmp_path, value=twice)

def test_it_runs_outside_the_main_thread(tmp_path):
    ends = []
    t = threading.Thread(target=lambda: ends.append(go(tmp_path)[0]))
    t.start()
    t.join()
    assert ends == [dict(step=12, finished=True)]

def test_a_stop_at_the_last_step_is_a_finish(tmp_path):
    def late(t, loss):
        if t == 11: os.kill(os.getpid(), signal.SIGTERM)
    assert go(tmp_path, value=late)[0] == dict(step=12, finished=True, stopped=True)

def test_progress_goes_to_stderr_and_shows_the_loss(tmp_path, capsys):
    go(tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == '' and '12/12' in err and 'loss=' in err

def test_bfloat16(tmp_path):
    cfg = replace(CFG, precision='bf16')
    acc = T.accelerator_for(cfg)
    try:
        net = nn.Linear(3, 1)
        opt = torch.optim.SGD(net.parameters(), lr=.1)
        net, opt = acc.prepare(net, opt)
        def step(batch):
            with acc.autocast():
                half = (batch[1] @ batch[1].T).dtype == torch.bfloat16
                loss = net(batch[1]).square().mean()
            opt.zero_grad()
            acc.backward(loss)
            opt.step()
            return dict(loss=loss, half=half)
        assert fit(step, toy()[1], dict(net=net, opt=opt), cfg, run_dir=tmp_path, accelerator=acc, progress=False)['finished']
        assert read_metrics(tmp_path)['half'][1] == [1.]*6
    finally: T.accelerator_for(CFG)

# ---- several processes

TWO = textwrap.dedent('''
    import os, shutil, signal, sys, torch
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    import two
    where, acc = Path(sys.argv[1]), two.accelerator
    end = two.run(where/'two', stop=lambda t: acc.process_index == 1 and t == 3)     # only one process is asked to stop
    assert end == dict(step=4, finished=False), end
    if acc.is_main_process: shutil.copytree(where/'two', where/'moved')
    acc.wait_for_everyone()
    end = two.run(where/'two')
    assert end == dict(step=10, finished=True), end
''')

MODULE = textwrap.dedent('''
    import os, signal, torch
    from torch import nn
    import protonb.training as T
    base = T.Train(device='cpu')
    accelerator = T.accelerator_for(base)

    def run(folder, stop=lambda t: False):
        n, rank = accelerator.num_processes, accelerator.process_index
        cfg = T.Train(steps=10, batch_size=8//n, device='cpu', log_every=3, checkpoint_every=5)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        opt = torch.optim.SGD(net.parameters(), lr=.2, momentum=.9)
        net, opt = accelerator.prepare(net, opt)
        sched = T.poly_lr(opt, cfg.steps)
        def batches(first):
            for t in range(first, cfg.steps):
                x = torch.randn(8, 4, generator=torch.Generator().manual_seed(t))
                yield t, x[rank*cfg.batch_size:][:cfg.batch_size]
        def step(batch):
            t, x = batch
            loss = (net(x) - x.prod(1, keepdim=True)).square().mean()
            opt.zero_grad()
            accelerator.backward(loss)
            opt.step()
            sched.step()
            if stop(t): os.kill(os.getpid(), signal.SIGTERM)
            return dict(loss=loss.detach(), **(dict(odd=loss.detach()*0 + t) if rank == n-1 and t % 2 else {}))
        return T.fit(step, batches, dict(net=net, opt=opt, sched=sched), cfg, run_dir=folder, accelerator=accelerator, progress=False)
''')

def test_two_processes_do_what_one_does(tmp_path, monkeypatch):
    (tmp_path/'two.py').write_text(MODULE)
    (tmp_path/'main.py').write_text(TWO)
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    r = subprocess.run([*launch, tmp_path/'main.py', tmp_path, tmp_path], env=env, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    monkeypatch.syspath_prepend(tmp_path)
    import two
    assert two.run(tmp_path/'one') == two.run(tmp_path/'moved') == dict(step=10, finished=True)   # moved: begun by two, ended by one
    want = read_states(tmp_path/'one'/'checkpoints'/'train-0000010')
    for name in 'two', 'moved':
        got = read_states(tmp_path/name/'checkpoints'/'train-0000010')
        assert list(got['net']) == list(want['net']) == ['0.weight', '0.bias', '2.weight', '2.bias']
        for k in want['net']: assert torch.allclose(got['net'][k], want['net'][k], atol=1e-6, rtol=0), (name, k)
        assert got['sched'] == want['sched']
        a, b = read_metrics(tmp_path/'one'), read_metrics(tmp_path/name)
        assert list(a) == list(b) == ['lr', 'loss', 'odd'] and a['odd'] == b['odd']
        for k in a: assert a[k][0] == b[k][0] and a[k][1] == pytest.approx(b[k][1], rel=1e-5, abs=1e-6)
    assert len(read_states(tmp_path/'two'/'checkpoints'/'train-0000010')['loop']['rng']) == 2
