"""Where captured tokens lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.attention import EqualGroups, attend, capture
from zoo.attention.capture import AttentionMap
from zoo.attention.halo import Halo
from zoo.attention.maps import windows
from zoo.attention.neighbourhood import ShiftedWindows
from zoo.attention.patterns import Padding
from zoo.attention.routed import Routed
from zoo.explain import Places, find_places


def captured(maps: int, queries: int, keys: int, **options: Any) -> AttentionMap:
    q, k = torch.randn(maps, 2, queries, 4), torch.randn(maps, 2, keys, 4)
    with capture() as found:
        attend(q, k, k, **options)
    return found["attend"]


def cells(places: tuple[Places, Places] | None) -> list[Tensor]:
    assert places is not None
    return [part.cells for part in places]


def test_tokens_of_the_whole_map_lie_row_by_row_after_those_of_classes() -> None:
    queries, keys = cells(find_places(captured(1, 12, 14), 1, (3, 4)))
    assert queries.tolist() == [list(range(12))]
    assert keys.tolist() == [[-1, -1, *range(12)]]
    (behind, _) = cells(find_places(captured(1, 15, 15), 1, (3, 4), behind=2))
    assert behind.tolist() == [[-1, *range(12), -1, -1]]


def test_fewer_tokens_are_pooled() -> None:
    places = find_places(captured(1, 35, 12), 1, (5, 7))
    assert places is not None
    assert places[1].grid == (3, 4)
    assert places[1].real == (2.5, 3.5)
    adaptive = find_places(captured(1, 35, 16), 1, (5, 7))
    assert adaptive is not None
    assert adaptive[1].real == adaptive[1].grid == (4, 4)


def test_windows_are_put_back_where_they_were_cut() -> None:
    numbers = torch.arange(6 * 8).view(1, 6, 8, 1)
    found = find_places(captured(12, 4, 4), 1, (5, 7))
    assert found is not None
    assert torch.equal(found[0].cells, windows(numbers, (2, 2))[..., 0])
    assert found[0].points.isnan().any(-1).sum() == 48 - 35
    one = find_places(captured(1, 16, 16), 1, (3, 3))
    assert one is not None
    assert (one[0].grid, one[0].real) == ((4, 4), (3, 3))


@pytest.mark.parametrize(
    "pattern",
    [
        Routed(torch.zeros(1, 4, 1, dtype=torch.long), (4, 6), (2, 3)),
        ShiftedWindows((4, 6), 2, shift=1) & Padding(torch.ones(1, 24, dtype=torch.bool)),
    ],
)
def test_a_pattern_knows_its_grid(pattern: Any) -> None:
    found = find_places(captured(1, 24, 24, pattern=pattern), 1, (4, 5))
    assert found is not None
    assert (found[0].grid, found[0].real) == ((4, 6), (4, 5))


def test_keys_in_a_border_lie_nowhere() -> None:
    pattern = Halo((3, 4), 2, 1, bordered=True, stride=2)
    found = find_places(captured(1, 4, 36, pattern=pattern), 1, (2, 2))
    queries, keys = cells(found)
    assert queries.tolist() == [[0, 1, 2, 3]]
    assert keys.view(6, 6)[1:4, 1:5].tolist() == torch.arange(12).view(3, 4).tolist()
    assert int((keys < 0).sum()) == 36 - 12
    assert found is not None
    assert found[0].points[0, 3].tolist() == [1.0, 0.75]


def test_groups_are_filled_up_behind() -> None:
    (queries, _) = cells(find_places(captured(1, 12, 12, pattern=EqualGroups(4)), 1, (2, 5)))
    assert queries.tolist() == [[*range(10), -1, -1]]


def test_what_fits_no_grid_has_no_places() -> None:
    assert find_places(captured(1, 30, 30), 1, (3, 4)) is None
    assert find_places(captured(3, 12, 12), 1, (3, 4)) is None
    assert find_places(captured(1, 12, 12), 1, (3, 4), order="none") is None
    learned = find_places(captured(1, 4, 12), 1, (3, 4), order="learned")
    assert learned is not None
    assert learned[0].token_at((0.5, 0.5)) is None


def test_points_find_tokens_and_values_their_cells() -> None:
    places = find_places(captured(4, 4, 4), 1, (4, 3))
    assert places is not None
    assert places[0].token_at((0.0, 0.0)) == (0, 0)
    assert places[0].token_at((0.99, 0.99)) == (3, 2)
    raster = places[0].raster(torch.arange(16.0).view(4, 4))
    assert raster.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_a_square_of_keys_is_pooled_or_the_map_with_a_class_as_its_module_says() -> None:
    found = captured(1, 48, 49)
    _, keys = cells(find_places(found, 1, (6, 8)))
    assert keys.tolist() == [[-1, *range(48)]]
    places = find_places(found, 1, (6, 8), order="pooled")
    assert places is not None
    assert places[1].grid == (7, 7)
