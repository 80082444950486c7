"""Tables of results: CSV files in which a row stands once for each key."""
import csv

from protonb.core import atomic_path


def read_rows(path):
    "Rows as dicts of texts; none where there is no file."
    if not path.exists(): return []
    with open(path, newline='') as f: return list(csv.DictReader(f))


def replace_row(path, row, key, columns, ordered=False):
    "Add a row; those with the same values in the columns of `key` go. With `ordered` the table is sorted by them."
    of = lambda r: tuple(str(r[k]) for k in key)
    rows = [r for r in read_rows(path) if of(r) != of(row)]+[row]
    with atomic_path(path) as p, open(p, 'w', newline='') as f:
        out = csv.DictWriter(f, columns, lineterminator='\n', restval='')
        out.writeheader()
        out.writerows(sorted(rows, key=of) if ordered else rows)
