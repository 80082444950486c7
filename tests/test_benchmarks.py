"The harness of benchmarks/: peers that agree, rows that replace rows, no row without green tests."
import csv
import os
import sys
from pathlib import Path
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import bench  # noqa: E402
from entries import ENTRIES, GOALS  # noqa: E402
from methods import METHODS  # noqa: E402


@pytest.fixture
def args(): return type('Args', (), dict(seconds=.05))()


@pytest.mark.parametrize('entry', ENTRIES+METHODS, ids=[e.name for e in ENTRIES+METHODS])
def test_peers_compute_the_same_and_rows_are_whole(entry, args):
    for case in entry.cases('cpu', True):
        rows = bench.measure(entry, case, bench.Timer('cpu'), args, (10., .1))
        assert {r['provider'] for r in rows} == set(entry.providers(case, 'cpu')) and {r['mode'] for r in rows} == set(entry.modes)
        for r in rows:
            assert set(r) <= set(bench.COLUMNS) and float(r['p20_ms']) <= float(r['median_ms']) <= float(r['p80_ms'])
            assert float(r['median_ms']) > 0 and float(r['extra_MB']) >= 0


def test_a_peer_that_computes_something_else_is_caught(args):
    entry = ENTRIES[0]
    wrong = type(entry)(**{**entry.__dict__, 'providers': lambda case, device: dict(ours=entry.providers(case, device)['ours'], wrong=lambda i: 1.01*entry.providers(case, device)['ours'](i))})
    with pytest.raises(AssertionError, match='wrong forward: result 0 is off by'): bench.measure(wrong, entry.cases('cpu', True)[0], bench.Timer('cpu'), args, (1., 1.))


@pytest.mark.parametrize('slow', [1000, 0])
def test_each_provider_in_its_process(args, monkeypatch, capsys, slow):
    "A peer that fails or takes its process down is left out, with the reason; one that is wrong is caught. A slow run's first time counts."
    monkeypatch.setattr(bench, 'SLOW', slow)
    entry, case = ENTRIES[0], ENTRIES[0].cases('cpu', True)[0]
    def fails(i): raise MemoryError('too large')
    def measured(**more):
        odd = type(entry)(**{**entry.__dict__, 'providers': lambda case, device: entry.providers(case, device) | more})
        return bench.measure(odd, case, bench.Timer('cpu'), args, (1., 1.), isolate=True)
    rows, said = measured(fails=fails, dies=lambda i: os._exit(9)), capsys.readouterr().out
    assert {(r['mode'], r['provider']) for r in rows} == {(m, n) for m in entry.modes for n in entry.providers(case, 'cpu')}
    assert all(float(r['median_ms']) > 0 and float(r['extra_MB']) >= 0 for r in rows)
    assert 'fails: left out, RuntimeError: MemoryError: too large' in said and 'dies: left out, RuntimeError: the process died' in said
    with pytest.raises(AssertionError, match='wrong forward: result 0 is off by'): measured(wrong=lambda i: 1.01*entry.providers(case, 'cpu')['ours'](i))


def test_every_operation_has_an_entry_and_goals_name_real_ones():
    names = {e.name for e in ENTRIES}
    assert names == {'masked_average_pool', 'prototype_cross_entropy', 'prototype_logits', 'nearest_prototype', 'logits_cross_entropy', 'prototype_contrast',
                     'soft_neighbourhood_density'}
    for g in GOALS:
        entry = next(e for e in ENTRIES if e.name == g['op'])
        case = next(c for c in entry.cases('cpu', False) if c['shape'] == g['shape'])
        assert set(g['faster']) <= set(entry.providers(case, 'cpu')) and g['mode'] in entry.modes


def row(**more): return dict(dict.fromkeys(bench.COLUMNS, ''), op='a', provider='ours', mode='both', shape='1', median_ms='2.0', extra_MB='1.0', layout='nchw', dtype='float32') | more


def test_rows_replace_rows_of_the_same_key(tmp_path):
    path = tmp_path/'results.csv'
    bench.write_rows([row(), row(provider='peer')], path)
    bench.write_rows([row(median_ms='1.0')], path)
    with open(path) as f: got = [(r['provider'], r['median_ms']) for r in csv.DictReader(f)]
    assert sorted(got) == [('ours', '1.0'), ('peer', '2.0')] and not list(tmp_path.glob('*.tmp'))


def test_missed_goals_are_said():
    goals = [dict(op='a', mode='both', shape='1', faster=dict(peer=3), extra_MB=.5)]
    said = bench.missed([row(), row(provider='peer', median_ms='5.0')], goals)
    assert said == ['a is 2.50 times faster than peer, wanted 3', 'a holds 1.00 MB extra, wanted below 0.5']
    assert not bench.missed([row(extra_MB='.4'), row(provider='peer', median_ms='6.0')], goals)
    assert bench.missed([row(extra_MB='.4')], goals) and not bench.missed([row(shape='2')], goals)


def test_extra_memory_is_counted():
    def f():
        a = torch.ones(1000, 100)                # 400 kB that are gone at the end
        return a.sum(0)
    assert 400e3 <= bench.extra_bytes(f, 'cpu') < 410e3


def test_no_row_without_green_tests(monkeypatch, tmp_path, capsys):
    red = tmp_path/'test_red.py'
    red.write_text('def test_red(): assert False')
    entry = type(ENTRIES[0])(**{**ENTRIES[0].__dict__, 'cpu_tests': [str(red)]})
    monkeypatch.setattr(bench, 'ENTRIES', [entry])
    monkeypatch.setattr(bench, 'RESULTS', tmp_path/'results.csv')
    monkeypatch.setattr(bench, 'ceilings', lambda timer: (1., 1.))
    monkeypatch.setattr(sys, 'argv', ['bench.py', '--quick', '--threads', '1', '--only', entry.name])
    with pytest.raises(SystemExit, match='its tests fail, not measured'): bench.main()
    assert not (tmp_path/'results.csv').exists()


def test_one_graph_at_a_time_is_measured_beside_three(capsys):
    import subprocess
    path = Path(__file__).parents[1]/'benchmarks'/'wdass_step.py'
    said = subprocess.run([sys.executable, path, '--quick', '--rounds', '1', '--steps', '1'], check=True, capture_output=True, text=True).stdout
    assert all(w in said for w in ('one at a time', 'three at once', 'memory: ', 'seconds: '))
