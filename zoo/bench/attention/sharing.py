"""Shared heads: key-driven groups against equal ones, decoding with latents against expanded heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.attend import attend
from zoo.attention.layers.base import AttentionLayer
from zoo.attention.layers.compressed import CompressedConvolutional
from zoo.attention.layers.key_driven import KeyDrivenGQA
from zoo.attention.layers.latent import MultiHeadLatent
from zoo.attention.layers.multihead import HeadCache
from zoo.bench.compare import Job
from zoo.bench.suite import Case, Growth, Suite
from zoo.bench.timing import Call


class _Equal(KeyDrivenGQA):
    """Key-driven groups of equal size, whatever the keys."""

    def allocation(self, norms: Tensor) -> Tensor:
        return torch.full_like(norms, self.num_heads // self.num_kv_heads, dtype=torch.long)


class _Expanded(MultiHeadLatent):
    """Latent heads that are always expanded."""

    def absorbs(self, nq: int, nk: int) -> bool:
        return False


def _tokens(batch: int, n: int, dim: int, device: torch.device) -> Tensor:
    return torch.randn(batch, n, dim, generator=torch.Generator().manual_seed(0)).to(device)


def _trained(layer: AttentionLayer, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Output and gradients of one training call, flat."""
    out = forward(x)
    grads = torch.autograd.grad(out, (x, *layer.parameters()), torch.ones_like(out))
    return torch.cat([part.flatten() for part in (out, *grads)])


def _key_driven(device: torch.device) -> Job:
    """ViT-B (12 heads, 6 of keys and values, 4 images); results are those of groups made equal."""
    layer, equal = (kind(768, 12, num_kv_heads=6).to(device) for kind in (KeyDrivenGQA, _Equal))
    equal.load_state_dict(layer.state_dict())
    x = _tokens(4, 197, 768, device).requires_grad_()

    def grouped(x: Tensor) -> Tensor:
        q, k, v = (equal.split(proj(x)) for proj in (equal.q, equal.k, equal.v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return equal.proj(out.transpose(1, 2).flatten(2))

    return Job(
        "key-driven groups",
        ours=lambda: _trained(layer, layer, x),
        peer=lambda: _trained(equal, grouped, x),
        ours_result=lambda: _trained(equal, equal, x),
        peer_result=lambda: _trained(equal, grouped, x),
    )


def _filled(layer: MultiHeadLatent, tokens: Tensor) -> HeadCache:
    cache = layer.init_cache(len(tokens))
    tables = layer.tables(torch.arange(tokens.shape[1], device=tokens.device))
    cache.extend((layer.latents(tokens, *tables),), None)
    return cache


def _stepper(layer: MultiHeadLatent, tokens: Tensor) -> Callable[[], Tensor]:
    """Decodes the last of the tokens, after all others, as often as it is called."""
    before, last = tokens[:, :-1], tokens[:, -1:]
    cache = _filled(layer, before)

    def step() -> Tensor:
        cache.length = before.shape[1]
        return layer.step(last, cache)

    return step


def _lite(kind: type[MultiHeadLatent], device: torch.device) -> MultiHeadLatent:
    """A layer as in DeepSeek-V2-Lite."""
    torch.manual_seed(0)
    return kind(2048, 16, kv_rank=512).to(device).eval()


def _against_expanding(n: int) -> Callable[[torch.device], Job]:
    @torch.no_grad()
    def build(device: torch.device) -> Job:
        tokens = _tokens(1, n, 2048, device)
        ours, peer = (_stepper(_lite(kind, device), tokens) for kind in (MultiHeadLatent, _Expanded))
        return Job("latent decoding", ours, peer, ours, peer)

    return build


def _against_cached_heads(n: int) -> Callable[[torch.device], Job]:
    """The peer has keys and values of all heads ready, the new token's too."""

    @torch.no_grad()
    def build(device: torch.device) -> Job:
        layer, tokens = _lite(MultiHeadLatent, device), _tokens(1, n, 2048, device)
        ours = _stepper(layer, tokens)
        tables = layer.tables(torch.arange(n, device=device))
        k, v = layer.heads(layer.latents(tokens, *tables))
        last = [table[-1:] for table in tables]

        @torch.no_grad()
        def peer() -> Tensor:
            q = layer.queries(tokens[:, -1:], *last)
            return layer.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

        return Job("latent decoding", ours, peer, ours, peer)

    return build


def _shared_keys(device: torch.device) -> Job:
    q, kv = _tokens(16, 1, 576, device)[None], _tokens(1, 4096, 576, device)[None]

    def ours() -> Tensor:
        return attend(q, kv, kv)

    def peer() -> Tensor:
        return F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True)

    return Job("one query", ours, peer, ours, peer)


def _training(make: Callable[[], AttentionLayer]) -> Callable[[int, torch.device], Call]:
    def build(n: int, device: torch.device) -> Call:
        layer = make().to(device)
        x = _tokens(1, n, layer.dim, device).requires_grad_()
        return lambda: _trained(layer, layer, x)

    return build


@torch.no_grad()
def _decoding(n: int, device: torch.device) -> Call:
    layer = MultiHeadLatent(64, 16, kv_rank=224, nope_dim=32, rope_dim=32, value_dim=32).to(device)
    return _stepper(layer, _tokens(1, n, 64, device))


def _small_latent() -> MultiHeadLatent:
    return MultiHeadLatent(32, 2, kv_rank=16, nope_dim=12, rope_dim=4, value_dim=16)


SUITE = Suite(
    cases=(
        Case("key-driven groups, ViT-B with 6 of 12 heads, static groups", _key_driven, target=1 / 1.05),
        Case("latent decoding at 4,096 tokens, expanded at each step", _against_expanding(4096), target=2.0),
        Case("latent decoding at 4,096 tokens, all heads cached", _against_cached_heads(4096)),
        Case("one query of 16 heads that share 4,096 keys, SDPA", _shared_keys),
    ),
    growth=(
        Growth("key-driven groups", _training(lambda: KeyDrivenGQA(32, 2, num_kv_heads=2))),
        Growth("latent heads, expanded", _training(_small_latent)),
        Growth("latent heads, one token decoded", _decoding),
        Growth("compressed convolutional", _training(lambda: CompressedConvolutional(64, 2))),
    ),
)
