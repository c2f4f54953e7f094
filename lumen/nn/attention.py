"""The attention half of a block: x + post_norm(o(attend(turn(q, k), v))) with q, k, v projected from norm(x)."""

from torch import Tensor, nn

from lumen.nn.cache import KVCache
from lumen.nn.layers import Norm, project_normed
from lumen.nn.linear import Linear
from lumen.nn.static_cache import StaticCache
from lumen.ops.attention import Reach, attention
from lumen.ops.decode_attention import Filled, decode_attention
from lumen.ops.project import project
from lumen.ops.rotary import rotate_qk
from lumen.spec import ModelSpec

Places = tuple[Tensor, Tensor, Reach | Filled | None]  # for a kind of layer: cos, sin (B, T, E/2), what a query sees


class Attention(nn.Module):
    """Grouped-query attention of layer `index`; window, soft cap, biases and per-head norms as the spec says."""

    def __init__(self, spec: ModelSpec, index: int):
        super().__init__()
        q_dim, kv_dim = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q = Linear(spec.dim, q_dim, bias="q" in spec.bias)
        self.k = Linear(spec.dim, kv_dim, bias="k" in spec.bias)
        self.v = Linear(spec.dim, kv_dim, bias="v" in spec.bias)
        self.o = Linear(q_dim, spec.dim, bias="o" in spec.bias)
        per_head = spec.qk_norm == "head"
        self.q_norm = Norm(spec, spec.head_dim) if per_head else None
        self.k_norm = Norm(spec, spec.head_dim) if per_head else None
        self.index = index
        self.head_dim = spec.head_dim
        self.kind = spec.layers[index].kind
        self.options = {"scale": spec.scale, "softcap": spec.softcap}

    def forward(
        self,
        x: Tensor,
        norm: Norm,
        post_norm: Norm | None,
        places: dict[str, Places],
        cache: KVCache | StaticCache | None,
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v, x = project_normed((self.q, self.k, self.v), x, norm)
        q, k, v = (part.view(B, T, -1, self.head_dim) for part in (q, k, v))  # (B, T, H, E), (B, T, K, E) twice
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin, reach = places[self.kind]
        q, k, v = rotate_qk(q, k, v, cos, sin)
        if cache is not None:
            k, v = cache.append(self.index, k, v)  # (B, S, K, E)
        if isinstance(reach, Filled):
            out = decode_attention(q, k, v, reach.length, reach.first, **self.options)
        else:
            out = attention(q, k, v, reach=reach, **self.options)
        out = out.reshape(B, T, -1)
        if post_norm is None:
            return project([self.o.projection()], out, residual=x)[0]
        return x + post_norm(self.o(out))
