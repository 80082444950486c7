"A run that is killed, stopped or interrupted anywhere and started again ends as one that was not."
import json, os, signal, subprocess, sys, textwrap

import pytest
from safetensors.torch import load_file

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}

# With arguments the script is one run. Without, it waits for runs on stdin and forks for each: importing torch once saves a minute.
SCRIPT = textwrap.dedent('''
    import gc, json, os, random, signal, subprocess, sys, time, torch
    from torch import nn
    from torch.nn import functional as F
    import protonb.training as T
    from protonb.core import rng_for

    class Noise(torch.utils.data.Dataset):
        def __init__(self, cfg, first): self.cfg, self.first = cfg, first
        def __len__(self): return (self.cfg.steps - self.first)*self.cfg.batch_size
        def __getitem__(self, i):
            x = rng_for(self.cfg.seed, 'noise', self.first*self.cfg.batch_size + i).standard_normal((3, 8, 8), dtype='float32')
            return torch.from_numpy(x), torch.from_numpy(x.mean(0) > 0).long()

    def main(where, die, how, workers):
        cfg = T.Train(steps=14, batch_size=4, seed=3, workers=workers, device='cpu', log_every=3, checkpoint_every=5)
        T.seed_everything(cfg.seed, 'init')
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.3), nn.Conv2d(8, 2, 1))
        opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9, weight_decay=1e-4)
        sched, seen = T.poly_lr(opt, cfg.steps), {'steps': 0, 'draws': []}
        random.random()                                        # a global state that differs from process to process

        def batches(first): return torch.utils.data.DataLoader(Noise(cfg, first), cfg.batch_size, num_workers=workers)

        def step(batch):
            x, y = batch
            loss = F.cross_entropy(net(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()
            seen['steps'] += 1
            seen['draws'] = seen['draws'][-2:] + [random.random()]
            if seen['steps'] == die:
                if how.startswith('group-'):         # from outside, as a terminal or a scheduler does: workers obey their parent
                    subprocess.run(['kill', '-s', how[9:], '--', f'-{os.getpgid(0)}'], start_new_session=True, check=True)
                    time.sleep(.5)                   # time to notice that workers have died, if they have
                elif how != 'writing': os.kill(os.getpid(), getattr(signal, how))
            return dict(loss=loss.detach(), **(dict(late=loss.detach()*2) if seen['steps'] > 6 else {}))

        if how == 'writing':                 # dies in the checkpoint of step `die`, between its first and its second file
            real, count = T.safetensors.torch.save_file, [0]
            def save_file(*args, **kw):
                count[0] += 1
                if seen['steps'] == die and count[0] % 2 == 0: os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kw)
            T.safetensors.torch.save_file = save_file
        parts = dict(net=net, opt=opt, sched=sched, seen=seen)
        print(json.dumps(T.fit(step, batches, parts, cfg, run_dir=where, config=dict(lr=.1), progress=False)), flush=True)
        open(where + '.rng', 'w').write(f'{random.random()} {torch.rand(())}')

    if len(sys.argv) > 1: main(sys.argv[1], 0, '-', 0)
    else:
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)     # the first optimizer imports half of torch
        gc.freeze()
        for line in sys.stdin:
            *job, out, err = json.loads(line)
            if pid := os.fork(): print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
            else:
                os.setsid()
                for fd, file in (1, out), (2, err): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
                main(*job)
                if job[-1]: break                                   # with workers: out by the front door
                os._exit(0)                                         # taking torch down costs more than the run
''')

class Runs:
    "Starts runs of the script in a folder."
    def __init__(self, tmp):
        self.tmp, self.script = tmp, tmp/'script.py'
        self.script.write_text(SCRIPT)
        self.server = subprocess.Popen([sys.executable, self.script], env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, name, die=0, how='-', workers=0):
        "Exit code, what fit returned (None if killed), stderr"
        out, err = self.tmp/f'{name}.out', self.tmp/f'{name}.err'
        self.server.stdin.write(json.dumps([str(self.tmp/name), die, how, workers, str(out), str(err)]) + '\n')
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        return code, json.loads(out.read_text() or 'null'), err.read_text()

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp('resume'))
    whole = subprocess.run([sys.executable, runs.script, runs.tmp/'whole'], env=ENV, capture_output=True, text=True, timeout=120)
    assert json.loads(whole.stdout) == dict(step=14, finished=True) and whole.stderr == '', whole.stderr
    yield runs
    runs.server.stdin.close()
    runs.server.wait(30)

def contents(run):
    "Everything in the final checkpoint that a computation can depend on"
    folder = run/'checkpoints'/'train-0000014'
    return {f.name: load_file(f) for f in sorted(folder.glob('*.safetensors'))}, (folder/'state.json').read_bytes()

def assert_same(a, b):
    assert (a/'metrics.csv').read_bytes() == (b/'metrics.csv').read_bytes()
    (want, want_state), (got, got_state) = contents(a), contents(b)
    assert list(want) == list(got) == ['loop.safetensors', 'net.safetensors', 'opt.safetensors']
    for file in want:
        assert want[file].keys() == got[file].keys()
        for name, t in want[file].items(): assert t.dtype == got[file][name].dtype and t.equal(got[file][name]), (file, name)
    assert want_state == got_state

@pytest.mark.parametrize('how, die, workers, left', [
    ('SIGKILL', 7, 0, 5), ('SIGKILL', 3, 0, None), ('SIGKILL', 11, 2, 10), ('writing', 10, 0, 5), ('writing', 5, 0, None),
    ('SIGTERM', 7, 0, 7), ('SIGINT', 8, 0, 8), ('SIGTERM', 10, 0, 10), ('group-SIGTERM', 7, 2, 7), ('group-SIGINT', 4, 1, 4)])
def test_stopped_and_started_again(runs, how, die, workers, left):
    name = f'{how}-{die}-{workers}'
    folder, killed = runs.tmp/name, how in ('SIGKILL', 'writing')
    code, end, err = runs(name, die, how, workers)
    assert code == (-signal.SIGKILL if killed else 0), err
    assert end == (None if killed else dict(step=left, finished=False)) and err == ''
    there = sorted(p.name for p in folder.glob('checkpoints/*') if p.name[0] != '.')
    assert there[-1:] == ([] if left is None else [f'train-{left:07d}'])
    assert bool(list(folder.rglob('*.tmp'))) == (how == 'writing')
    assert runs(name, workers=workers) == (0, dict(step=14, finished=True), '')
    assert_same(runs.tmp/'whole', folder)
    assert not list(folder.rglob('*.tmp'))
    assert runs(name, die=1, how='SIGKILL') == (0, dict(step=14, finished=True), '')   # finished: no step is run
    assert len({(runs.tmp/f'{n}.rng').read_text() for n in ('whole', name)}) == 1      # what is drawn next does not differ either

def test_killed_at_every_restart(runs):
    for die in (3, 7, 9, 12): assert runs('often', die, 'SIGTERM' if die == 9 else 'SIGKILL')[0] == (0 if die == 9 else -9)
    assert runs('often')[1] == dict(step=14, finished=True)
    assert_same(runs.tmp/'whole', runs.tmp/'often')
