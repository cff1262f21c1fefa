"""Multi-scale deformable attention: the definition, the table of rows, and the layer."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError, backend, capture
from zoo.attention.deformable import Shapes, deformable_attend
from zoo.attention.layers.deformable import DeformableAttention, values_of

SHAPES = ((3, 5), (2, 2), (1, 3))
CELLS = 22


def inputs(shapes: Shapes = SHAPES, queries: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Values, locations (some of them outside of the maps) and weights."""
    g = torch.Generator().manual_seed(0)
    cells, levels = sum(rows * columns for rows, columns in shapes), len(shapes)
    values = torch.randn(2, cells, 2, 4, generator=g, dtype=dtype)
    locations = torch.rand(2, queries, 2, levels, 3, 2, generator=g, dtype=dtype) * 1.8 - 0.4
    weights = torch.rand(2, queries, 2, levels, 3, generator=g, dtype=dtype)
    return [x.requires_grad_() for x in (values, locations, weights)]


def attended(parts: list[Tensor], shapes: Shapes = SHAPES, by: str | None = None) -> Tensor:
    values, locations, weights = parts
    if by is None:
        return deformable_attend(values, shapes, locations, weights)
    with backend(by):
        return deformable_attend(values, shapes, locations, weights)


def pixel_by_pixel(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Equation 3 with the four neighbours of every point written out."""
    batch, queries, heads, levels, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, values.shape[3], dtype=values.dtype)
    starts = [sum(rows * columns for rows, columns in shapes[:i]) for i in range(levels)]
    for b, q, h, level, p in product(*(range(n) for n in (batch, queries, heads, levels, points))):
        rows, columns = shapes[level]
        x, y = (
            float(z) * n - 0.5 for z, n in zip(locations[b, q, h, level, p], (columns, rows), strict=True)
        )
        for i, j in product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
            if 0 <= i < rows and 0 <= j < columns:
                share = (1 - abs(y - i)) * (1 - abs(x - j)) * weights[b, q, h, level, p]
                out[b, q, h] += share * values[b, starts[level] + i * columns + j, h]
    return out


@pytest.mark.parametrize("by", [None, "reference"])
def test_is_the_sum_over_the_neighbours_of_all_points(by: str | None) -> None:
    values, locations, weights = (x.detach() for x in inputs())
    expected = pixel_by_pixel(values, SHAPES, locations, weights)
    torch.testing.assert_close(attended([values, locations, weights], by=by), expected)


def test_gradients_are_those_of_finite_differences() -> None:
    shapes = ((2, 3), (1, 2))
    assert torch.autograd.gradcheck(
        lambda v, x, w: deformable_attend(v, shapes, x, w), inputs(shapes, queries=1), fast_mode=True
    )


@pytest.mark.parametrize("shapes", [((1, 1),), ((4, 3),), SHAPES, ((7, 2), (1, 9), (5, 5), (2, 2))])
def test_gradients_are_those_of_the_reference(shapes: Shapes) -> None:
    results = []
    for by in (None, "reference"):
        parts = inputs(shapes, queries=9)
        out = attended(parts, shapes, by)
        results.append((out, *torch.autograd.grad(out.sin().sum(), parts)))
    torch.testing.assert_close(results[0], results[1])


def test_points_far_outside_give_zero_and_no_gradient() -> None:
    values, locations, weights = inputs()
    locations = (locations.detach().sign() * 1e9).requires_grad_()
    out = deformable_attend(values, SHAPES, locations, weights)
    assert not out.any()
    for grad in torch.autograd.grad(out.sum(), (values, locations, weights)):
        assert not grad.any()


def test_a_place_that_is_not_a_number_spoils_its_own_query_only() -> None:
    values, locations, weights = (x.detach() for x in inputs())
    expected = deformable_attend(values, SHAPES, locations, weights)
    locations[1, 2, 0, 1, 0, 0] = torch.nan
    out = deformable_attend(values, SHAPES, locations, weights)
    assert out[1, 2, 0].isnan().all()
    out[1, 2, 0] = expected[1, 2, 0]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    halves = [x.detach().to(dtype) for x in inputs()]
    out = attended(halves)
    assert out.dtype == dtype
    torch.testing.assert_close(out, attended([x.float() for x in halves]).to(dtype))


def test_nothing_of_the_size_of_what_is_sampled_is_kept_for_the_backward_pass() -> None:
    parts = inputs(queries=50)
    kept = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attended(parts)
    assert sum(kept) == sum(x.numel() for x in parts)


@pytest.mark.parametrize("by", [None, "reference"])
def test_a_capture_keeps_the_points_and_spreads_them_over_cells(by: str | None) -> None:
    layer, query, references, memory = layer_and_inputs()
    expected = read(layer, query, references, memory)
    with capture(layer) as maps, backend(by or "sdpa"):
        torch.testing.assert_close(read(layer, query, references, memory), expected)
    found = maps["DeformableAttention"]
    assert found.locations.shape == (2, 4, 2, 3, 2, 2)
    assert found.weights.shape == (2, 2, 4, CELLS)
    summed = torch.einsum("bhqs,bshd->bqhd", found.weights, found.values)
    torch.testing.assert_close(summed, found.output, atol=1e-6, rtol=1e-5)


def test_compiles_without_graph_breaks_forward_and_backward() -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (True, False):
        layer, query, references, memory = layer_and_inputs()

        def run(query: Tensor, memory: Tensor, layer=layer, references=references) -> Tensor:
            return read(layer, query, references, memory)

        run = torch.compile(run, fullgraph=True, backend="eager") if compiled else run
        out = run(query, memory)
        out.square().sum().backward()
        results.append((out, query.grad, memory.grad, layer.sampling_offsets.weight.grad))
    torch.testing.assert_close(results[0], results[1])


def read(
    layer: DeformableAttention, query: Tensor, references: Tensor, memory: Tensor, mask: Tensor | None = None
) -> Tensor:
    return layer(query, references, layer.values(memory, mask), SHAPES)


# ---- the layer ---------------------------------------------------------------------------------------------


def layer_and_inputs() -> tuple[DeformableAttention, Tensor, Tensor, Tensor]:
    """A layer with offsets and weights that depend on the query; query, references, memory."""
    torch.manual_seed(0)
    layer = DeformableAttention(8, 2, num_levels=3, num_points=2)
    for part in (layer.sampling_offsets, layer.attention_weights):
        torch.nn.init.normal_(part.weight)
    query, memory = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, CELLS, 8, requires_grad=True)
    return layer, query, torch.rand(2, 4, 3, 2), memory


def test_has_the_official_names_and_shapes() -> None:
    state = DeformableAttention(256, 8).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }


def test_offsets_start_in_rings_and_weights_equal() -> None:
    layer = DeformableAttention(16, 8, num_levels=2, num_points=3)
    offsets = layer.sampling_offsets.bias.view(8, 2, 3, 2)
    torch.testing.assert_close(offsets.abs().amax(-1), torch.tensor([1.0, 2.0, 3.0]).expand(8, 2, 3))
    torch.testing.assert_close(offsets[:, 0], offsets[:, 1])
    torch.testing.assert_close(offsets[1, 0, 0], torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(offsets[4, 0, 2], torch.tensor([-3.0, 0.0]), atol=1e-6, rtol=0)
    assert not layer.attention_weights.weight.any()
    assert not DeformableAttention(16, 8, rings=False).sampling_offsets.bias.any()


def test_an_offset_is_in_cells_of_the_map_for_a_point_and_in_parts_of_half_a_side_for_a_box() -> None:
    layer = DeformableAttention(8, 2, num_levels=3, num_points=2)
    offsets = torch.randn(1, 1, 2, 12)
    points = torch.rand(1, 1, 3, 2)
    places = layer._locations(offsets, points, SHAPES).view(2, 3, 2, 2)
    for level, (rows, columns) in enumerate(SHAPES):
        moved = offsets.view(2, 3, 2, 2)[:, level] / torch.tensor([columns, rows])
        torch.testing.assert_close(places[:, level], points[0, 0, level] + moved)
    boxes = torch.rand(1, 1, 3, 4)
    places = layer._locations(offsets, boxes, SHAPES).view(2, 3, 2, 2)
    moved = offsets.view(2, 3, 2, 2) / 2 * boxes[0, 0, :, None, 2:] * 0.5
    torch.testing.assert_close(places, boxes[0, 0, :, None, :2] + moved)


def test_a_box_reads_within_itself_at_the_start() -> None:
    """The outermost of P points lies half a side away from the centre."""
    layer = DeformableAttention(8, 4, num_levels=1, num_points=4)
    box = torch.tensor([0.5, 0.5, 0.2, 0.4]).view(1, 1, 1, 4)
    places = layer._locations(layer.sampling_offsets.bias.view(1, 1, 4, 8), box, ((4, 4),)).view(4, 4, 2)
    reach = (places - box[0, 0, 0, :2]).abs().amax(1)
    torch.testing.assert_close(reach.amax(0), torch.tensor([0.1, 0.2]))


def test_padded_cells_are_read_as_zeros() -> None:
    layer, query, references, memory = layer_and_inputs()
    mask = torch.rand(2, CELLS) < 0.5
    layer.value_proj.bias.data.normal_()
    out = read(layer, query, references, memory, mask)
    other = torch.where(mask[..., None], memory, torch.randn_like(memory))
    torch.testing.assert_close(read(layer, query, references, other, mask), out)
    assert not layer.values(memory, mask)[~mask].any()


def test_values_of_several_layers_are_those_of_each() -> None:
    layers = [DeformableAttention(8, 2, num_levels=3) for _ in range(3)]
    memory, mask = torch.randn(2, CELLS, 8), torch.rand(2, CELLS) < 0.5
    for values, layer in zip(values_of(layers, memory, mask), layers, strict=True):
        expected = layer.value_proj(memory).masked_fill(~mask[..., None], 0).unflatten(-1, (2, 4))
        torch.testing.assert_close(values, expected)


def test_bfloat16_autocast_is_close() -> None:
    layer, query, references, memory = layer_and_inputs()
    exact = read(layer, query, references, memory)
    with torch.autocast("cpu", torch.bfloat16):
        rough = read(layer, query, references, memory)
    assert (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_mistakes_are_told() -> None:
    values, locations, weights = inputs()
    with pytest.raises(AttentionError, match="22 values do not fill maps"):
        deformable_attend(values, SHAPES[:2], locations, weights)
    with pytest.raises(AttentionError, match="at least one row"):
        deformable_attend(values, (), locations, weights)
    with pytest.raises(AttentionError, match="one per location"):
        deformable_attend(values, SHAPES, locations, weights[..., :1])
    with pytest.raises(AttentionError, match="locations are for"):
        deformable_attend(values[:, :, :1], SHAPES, locations, weights)
    with pytest.raises(AttentionError, match="floating point"):
        deformable_attend(values.long(), SHAPES, locations, weights)
    with pytest.raises(AttentionError, match=r"values are \(B, S, H, D\)"):
        deformable_attend(values[0], SHAPES, locations, weights)
    with pytest.raises(AttentionError, match="not divisible by 3 heads"):
        DeformableAttention(8, 3)
    with pytest.raises(AttentionError, match="at least one map"):
        DeformableAttention(8, 2, num_points=0)
    layer, query, references, memory = layer_and_inputs()
    with pytest.raises(AttentionError, match="references are"):
        read(layer, query, references[..., :1], memory)
    with pytest.raises(AttentionError, match="queries are"):
        read(layer, query[..., :4], references, memory)
    with pytest.raises(AttentionError, match="memory is"):
        read(layer, query, references, memory[..., :4])
    with pytest.raises(AttentionError, match="a mask is bool"):
        read(layer, query, references, memory, torch.ones(2, CELLS))
