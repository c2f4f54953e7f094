"""The attention half of a block: project, turn by position, attend, project back."""

from torch import Tensor, nn

from lumen.nn.cache import KVCache
from lumen.nn.layers import Norm
from lumen.nn.linear import Linear
from lumen.ops.attention import attention
from lumen.ops.rotary import rotary
from lumen.spec import ModelSpec

Places = tuple[Tensor, Tensor, Tensor | None]  # for a kind of layer: cos, sin (B, T, E/2), attention mask


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
        self.q_norm = Norm(spec, spec.head_dim) if per_head else nn.Identity()
        self.k_norm = Norm(spec, spec.head_dim) if per_head else nn.Identity()
        self.index = index
        self.head_dim = spec.head_dim
        self.kind = spec.layers[index].kind
        self.options = {"scale": spec.scale, "softcap": spec.softcap}

    def forward(self, x: Tensor, places: dict[str, Places], cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q(x).view(B, T, -1, self.head_dim))  # (B, T, H, E)
        k = self.k_norm(self.k(x).view(B, T, -1, self.head_dim))  # (B, T, K, E)
        v = self.v(x).view(B, T, -1, self.head_dim)
        cos, sin, mask = places[self.kind]
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.index, k, v)  # (B, S, K, E)
        return self.o(attention(q, k, v, mask=mask, **self.options).reshape(B, T, -1))
