import multiprocessing, os, signal, time
import numpy as np, pytest, torch
from protonb.core import InputError, rng_for
from protonb.sampling import Positions, Samples, batches, only, shuffled_index

N = 7

def make(position):
    i = shuffled_index(position, N, 3)
    return dict(index=i, noise=torch.from_numpy(rng_for(3, 'noise', position).normal(size=(2, 3))), pair=(torch.tensor(position), f'n{i}'))

def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(x['index'].equal(y['index']) and x['noise'].equal(y['noise']) and x['pair'][0].equal(y['pair'][0])
        and x['pair'][1] == y['pair'][1] for x, y in zip(a, b))

@pytest.mark.parametrize('n', [1, 2, 7, 100])
def test_every_epoch_is_a_permutation(n):
    order = [shuffled_index(p, n, 0) for p in range(3*n)]
    for e in range(3): assert sorted(order[e*n:(e+1)*n]) == list(range(n))

def test_order_does_not_depend_on_who_asked_before():
    want = [shuffled_index(p, N, 0) for p in range(60)]
    for p in np.random.default_rng(0).permutation(60): assert shuffled_index(int(p), N, 0) == want[p]

def test_order_is_the_same_in_another_process():
    there = [b.item() for b in batches(lambda p: shuffled_index(p, N, 11), steps=20, workers=1)]
    assert there == [shuffled_index(p, N, 11) for p in range(20)]

def test_order_depends_on_seed_stream_and_epoch_and_not_on_other_draws():
    of = lambda *a: [shuffled_index(p, 50, *a) for p in range(50)]
    orders = [of(0), of(1), of(0, 'target'), of(0, 2),
        [shuffled_index(p+50, 50, 0) for p in range(50)], rng_for(0, 'source', 0).permutation(50).tolist()]
    assert len({tuple(o) for o in orders}) == len(orders)

def test_workers_do_not_change_batches():
    whole = list(batches(make, steps=9, batch_size=2))
    assert len(whole) == 9 and whole[0]['noise'].shape == (2, 2, 3)
    for w in (1, 2): assert same(batches(make, steps=9, batch_size=2, workers=w), whole)

@pytest.mark.parametrize('k', [0, 1, 5, 8, 9, 12])
def test_first_step_gives_the_tail(k):
    whole = list(batches(make, steps=9, batch_size=2))
    assert same(batches(make, steps=9, batch_size=2, first_step=k), whole[k:])
    if k == 5: assert same(batches(make, steps=9, batch_size=2, first_step=k, workers=2), whole[k:])

@pytest.mark.parametrize('world,batch_size', [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_ranks_partition_the_positions(world, batch_size):
    got = [list(Positions(5, batch_size, rank=r, world=world)) for r in range(world)]
    flat = [p for t in range(5) for r in range(world) for p in got[r][t]]
    assert flat == list(range(5*world*batch_size))
    for r in range(world):
        real = [b['pair'][0].tolist() for b in batches(make, steps=5, batch_size=batch_size, rank=r, world=world)]
        assert real == got[r] and len(Positions(5, batch_size, rank=r, world=world)) == 5

def test_global_random_state_is_untouched():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    list(batches(make, steps=2, workers=1)), list(batches(make, steps=2))
    assert torch.rand(3).equal(want)

def test_any_sample_with_only():
    odd = lambda p: dict(episode=[torch.zeros(p+1), None], name=f'{p}')
    for w in (0, 1): assert [b['name'] for b in batches(odd, steps=3, workers=w, collate=only)] == ['0', '1', '2']
    with pytest.raises(ValueError, match='got 2'): next(batches(odd, steps=3, batch_size=2, collate=only))

@pytest.mark.parametrize('workers', [0, 2])
def test_input_error_arrives_as_one_sentence(workers):
    def bad(p):
        if p == 5: raise InputError('a/b.png: is broken')
        return p
    it, seen = batches(bad, steps=9, batch_size=2, workers=workers), []
    with pytest.raises(InputError) as e:
        for b in it: seen.append(b.tolist())
    assert str(e.value) == 'a/b.png: is broken' and seen == [[0, 1], [2, 3]]

def test_a_bug_keeps_its_traceback():
    def bug(p): raise KeyError('inside the maker')
    before = set(multiprocessing.active_children())           # of other tests: a compiler's workers, for one
    with pytest.raises(KeyError, match='in bug') as e: next(batches(bug, steps=2, workers=1))
    assert e.tb and set(multiprocessing.active_children()) <= before     # though the traceback is still held, the workers have ended

def test_workers_use_one_thread_and_survive_group_signals():
    def threads(p):
        time.sleep(.05)
        return torch.get_num_threads(), os.getpid()
    it = batches(threads, steps=20, workers=2)
    n, pid = next(it)
    assert n.item() == 1 and pid.item() != os.getpid()
    os.kill(pid.item(), signal.SIGINT)
    os.kill(pid.item(), signal.SIGTERM)
    assert len(list(it)) == 19

def test_stopping_early_ends_the_workers():
    it = batches(lambda p: os.getpid(), steps=1000, workers=2)
    pids = {next(it).item() for _ in range(4)}
    it.close()
    t = time.time()
    alive = lambda pid: os.path.exists(f'/proc/{pid}') and open(f'/proc/{pid}/stat').read().split()[2] != 'Z'
    while any(map(alive, pids)) and time.time() < t+10: time.sleep(.05)
    assert not any(map(alive, pids))

@pytest.mark.parametrize('kw,text', [(dict(batch_size=0), 'batch_size is 0'), (dict(workers=-1), 'workers is -1'),
    (dict(rank=2, world=2), r'rank is 2, expected 0\.\.1'),
    (dict(world=0), 'world is 0'), (dict(first_step=-1), 'first_step is -1')])
def test_bad_arguments(kw, text):
    with pytest.raises(InputError, match=text): batches(make, steps=3, **kw)

def test_empty_data_set():
    with pytest.raises(InputError, match='empty'): shuffled_index(0, 0, 0)
    assert Samples(lambda p: p+1)[4] == 5
