"""The palette for colour-blind readers: what it promises, by the measure it was chosen with and by another one."""
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from protonb.core import InputError
from protonb.labels import CITYSCAPES, SPACES, ClassSpace
from protonb.palettes import NEIGHBOURS, SIGHTS, as_seen, colour_difference, lab, safe, spread_colours, worst_differences

# Smallest difference of all pairs, CITYSCAPES in its own colours and in safe ones: 2.6 and 11.8; of neighbours: 3.1 and 21.1; lightness: 3.3 and 12.7.
FACTOR, NEIGHBOUR_FACTOR, STEP = 4., 6., 10.


def smallest(palette):
    """The closest pair under the worst sight."""
    return worst_differences(palette)[np.triu_indices(len(palette), 1)].min()


def neighbours(space):
    """Pairs of train ids."""
    return [tuple(map(space.index, p)) for p in NEIGHBOURS if {*p} <= {*space.classes}]


def cie76(palette, sight):
    """Distances in Lab, of colours rounded to what a screen shows."""
    x = lab(as_seen(palette, sight))
    return {(i, j): float(np.linalg.norm(x[i] - x[j])) for i, j in combinations(range(len(x)), 2)}


def test_the_closest_pair_is_much_further_apart():
    assert smallest(safe(CITYSCAPES).palette) > FACTOR * smallest(CITYSCAPES.palette)
    old, new = (min(min(cie76(s.palette, sight).values()) for sight in SIGHTS) for s in (CITYSCAPES, safe(CITYSCAPES)))
    assert new > 2 * old                                         # another measure agrees


@pytest.mark.parametrize("sight", SIGHTS)
def test_neighbours_differ_in_colour_and_in_lightness(sight):
    new = safe(CITYSCAPES)
    x, old = lab(new.palette, sight), lab(CITYSCAPES.palette, sight)
    pairs = neighbours(new)
    assert len(pairs) == 20
    differ = [float(colour_difference(x[a], x[b])) for a, b in pairs]
    assert min(differ) > NEIGHBOUR_FACTOR * min(worst_differences(CITYSCAPES.palette)[p] for p in pairs)
    assert min(differ) > min(float(colour_difference(old[a], old[b])) for a, b in pairs)
    light = lab(new.palette)[:, 0]
    assert min(abs(light[a] - light[b]) for a, b in pairs) > STEP


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_only_colours_change(space):
    new = safe(space)
    assert replace(new, palette=space.palette) == space and len({*new.palette}) == space.num_classes
    assert all(isinstance(v, int) and 0 <= v <= 255 for rgb in new.palette for v in rgb)
    assert not {(0, 0, 0), (255, 255, 255)} & {*new.palette}      # no class looks like a pixel without one, or like the page
    assert smallest(new.palette) > 3 * smallest(space.palette) and new == safe(space)


@pytest.mark.parametrize("K, least", [(1, 0), (2, 40), (11, 15), (26, 9.5), (40, 7)])
def test_any_number_of_classes(K, least):
    new = safe(ClassSpace("odd", tuple(f"c{i}" for i in range(K)), ((9, 9, 9),) * K))
    assert len({*new.palette}) == K and (K == 1 or smallest(new.palette) > least)


def test_black_and_white_are_kept_free():
    palette = np.array([(0, 0, 0), (255, 255, 255), *safe(CITYSCAPES).palette])
    assert smallest(palette) > FACTOR * smallest(CITYSCAPES.palette)


def test_numbers_of_colours_that_there_are_not():
    for K in (0, -1, 255):
        with pytest.raises(InputError, match="expected 1 to 254"):
            spread_colours(K)
    with pytest.raises(InputError, match="protanopia"):
        as_seen([[0, 0, 0]], "dog")


def test_sharmas_pairs_that_catch_mistakes():
    """Hue differences over 180 degrees, mean hues, grey colours: rows 9 to 16, 20 and 25 of the published table."""
    rows = [((50, 2.49, -.001), (50, -2.49, .0009), 7.1792), ((50, 2.49, -.001), (50, -2.49, .0011), 7.2195), ((50, -.001, 2.49), (50, .0009, -2.49), 4.8045),
            ((50, -.001, 2.49), (50, .0011, -2.49), 4.7461), ((50, 2.5, 0), (50, 0, -2.5), 4.3065), ((50, 2.5, 0), (61, -5, 29), 22.8977),
            ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644)]
    for p, q, known in rows:
        assert float(colour_difference(p, q)) == pytest.approx(known, abs=1e-4)


def test_the_matrices_keep_grey_and_lose_what_is_missing():
    for m in SIGHTS.values():
        assert np.allclose(m.sum(1), 1, atol=1e-5)
    red, green = ([255, 0, 0], [0, 255, 0])
    for sight in ("protanopia", "deuteranopia"):
        hue = lab([red, green], sight)
        assert abs(hue[0, 1] - hue[1, 1]) < 30 < abs(lab([red, green])[0, 1] - lab([red, green])[1, 1])
