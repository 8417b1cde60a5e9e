"""The GPT, and the one function this project is about: `mix_labels`.

Shapes, here and everywhere: B batch, T tokens, S sentences, K labels, C model width,
E sentence-vector width, V vocabulary, H heads, D head width.

The GPT is GPT-2 (Radford et al., 2019) without dropout and biases, and with the exact GELU,
which torch computes three times faster than GPT-2's approximation on a CPU in bfloat16. A plan
enters every block as a linear map of the plan, zero at the start, added to the attention output
before the output projection. It is projected for each sentence and looked up for each token
afterwards, since S is much smaller than T.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# NOTE(paper): the paper compares selecting one label with mixing them;
# the rest are controls (DESIGN 1).
PLANS = ("none", "fixed", "uniform", "hard", "straight_through", "gumbel",
         "soft_frozen", "soft", "oracle")
END_TO_END = ("straight_through", "gumbel", "soft")          # the LM loss reaches the planner
USES_PLANNER = tuple(p for p in PLANS if p not in ("none", "fixed", "uniform", "oracle"))


def mix_labels(logits: torch.Tensor, label_emb: torch.Tensor, plan: str,
               labels: torch.Tensor | None = None, tau: float = 1.0,
               generator: torch.Generator | None = None) -> torch.Tensor:
    """The planner's logits (B, S, K) and the label embeddings (K, C) -> the plan's rows (B, S, C).

    labels (B, S) are the true ones, which `oracle` alone looks at (-1 where unknown: taken as 0).
    `tau` is gumbel's temperature; without a generator there is no noise, and gumbel is soft.
    Source: "End-to-end Planner Training for Language Modeling", arXiv 2410.12492.
    Raises KeyError for an unknown plan.
    """
    K = label_emb.shape[0]
    one_hot = lambda index: F.one_hot(index, K).to(label_emb.dtype)         # (B, S) -> (B, S, K)
    probs = logits.softmax(-1)                                              # (B, S, K)
    weights = {
        "fixed": lambda: one_hot(torch.zeros_like(logits[..., 0], dtype=torch.long)),
        "uniform": lambda: torch.full_like(probs, 1 / K),
        "hard": lambda: one_hot(logits.argmax(-1)),
        # the value is exactly one_hot, for the bracket is exactly zero;
        # the gradient is that of probs
        "straight_through": lambda: one_hot(logits.argmax(-1)) + (probs - probs.detach()),
        "gumbel": lambda: probs if generator is None else (
            (logits + _gumbel_noise(logits, generator)) / tau).softmax(-1),
        "soft_frozen": lambda: probs.detach(),
        "soft": lambda: probs,
        "oracle": lambda: one_hot(labels.clamp(min=0)),
    }[plan]()
    return weights.to(label_emb.dtype) @ label_emb                              # (B, S, C)


def _gumbel_noise(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    # in float32 whatever the logits are: in bfloat16, 1 - 1e-6 is 1, and the noise infinite
    uniform = torch.rand(logits.shape, generator=generator, device=generator.device)
    uniform = uniform.clamp(1e-6, 1 - 1e-6)
    return -(-uniform.log()).log().to(logits)


class Cache:
    """Keys and values of the tokens so far, for generation:
    one pair (B, H, block_size, D) a layer."""

    def __init__(self):
        self.layers, self.length = {}, 0

    def append(self, layer: nn.Module, k: torch.Tensor, v: torch.Tensor, room: int):
        """Stores k, v (B, H, t, D) behind those of earlier calls and returns all of them."""
        if layer not in self.layers:
            self.layers[layer] = [x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (k, v)]
        end = self.length + k.shape[2]
        for buffer, new in zip(self.layers[layer], (k, v)):
            buffer[:, :, self.length:end] = new
        return [buffer[:, :, :end] for buffer in self.layers[layer]]


def attend(q, k, v, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v for q, k, v (B, H, T, D), where mask (B, 1, T, T) is True."""
    if q.device.type != "cpu" or k.shape[2] > 512:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    # torch's fused kernel is made for long rows; on a CPU this is faster below: 5 times at 64
    scores = (q * q.shape[-1] ** -0.5) @ k.mT                                   # (B, H, T, T)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


class Attention(nn.Module):
    """Causal self-attention, with a plan where the block has one."""

    def __init__(self, n_embd: int, n_head: int, planned: bool = False):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        self.plan_map = nn.Linear(n_embd, n_embd, bias=False) if planned else None

    def forward(self, x, plan=None, where=None, mask=None, cache=None, room=0):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.append(self, k, v, room)
        # With a cache, T is 1 or the cache was empty: either way no mask but the plain causal one
        y = attend(q, k, v, mask, causal=mask is None and T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)
        if plan is not None:
            rows = self.plan_map(plan)                                          # (B, S, C)
            y = y + F.embedding(where, rows.flatten(0, 1))                      # (B, T, C)
        return self.proj(y)


class Block(nn.Module):
    """Pre-norm transformer block; the planner's are the same, without a plan."""

    def __init__(self, n_embd: int, n_head: int, planned: bool = False):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head, planned)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x, **attention):
        x = x + self.attn(self.ln_1(x), **attention)
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


def init_weights(module: nn.Module, n_layer: int, generator: torch.Generator) -> None:
    """GPT-2's initialisation: N(0, 0.02^2),
    residual projections narrower by sqrt(2 n_layer), plan maps 0."""
    for name, p in module.named_parameters():
        if "plan_map" in name:
            nn.init.zeros_(p)
        elif p.dim() >= 2:
            residual = name.endswith(("proj.weight", "down.weight"))
            std = 0.02 / math.sqrt(2 * n_layer) if residual else 0.02
            nn.init.normal_(p, std=std, generator=generator)


def chunk(weight: torch.Tensor) -> int:
    """How many rows of logits, x @ weight.T, to make at a time; on a CPU, few enough to stay in
    its cache."""
    return max(1, (1 << 19 if weight.device.type == "cpu" else 1 << 28) // len(weight))


class MeanCrossEntropy(torch.autograd.Function):
    """The mean of F.cross_entropy(F.linear(x, weight[:vocab_size]), targets, ignore_index=-1),
    a few rows at a time.

    x (n, C), weight (V, C), targets (n,) -> a scalar, nats. The gradient is worked out
    along with the loss, so the (n, V) logits are never held: on a CPU a chunk stays in the
    cache, which halves the time.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size):
        device, dtype = x.device.type, weight.dtype
        if torch.is_autocast_enabled(device):        # products in its type, as F.linear's would be
            dtype = torch.get_autocast_dtype(device)
        x, w, counted = x.to(dtype), weight.to(dtype), targets >= 0
        n, targets, total = counted.sum().clamp(min=1), targets.clamp(min=0)[:, None], 0.0
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(weight)
        size = chunk(weight)
        for i in range(0, len(x), size):
            rows = slice(i, i + size)
            logits = x[rows] @ w.T                                              # (rows, V)
            logits[:, vocab_size:] = -math.inf       # rows that pad the matrix are no tokens
            probs = logits.softmax(-1, dtype=weight.dtype)
            likely = probs.gather(1, targets[rows])[:, 0].clamp(min=1e-37)      # log(0) never
            total -= (likely.log() * counted[rows]).sum()
            probs.scatter_add_(1, targets[rows], probs.new_full((len(probs), 1), -1.0))
            g = (probs * counted[rows, None]).to(dtype)
            grad_x[rows] = g @ w
            grad_w += g.T @ x[rows]
        ctx.save_for_backward(grad_x / n, grad_w / n)
        return total / n

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, grad_w * grad, None, None


class GPT(nn.Module):
    """A small GPT. With n_labels > 0 it has label embeddings and can be given a plan."""

    def __init__(self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int,
                 n_labels: int = 0, seed: int = 0):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_head={n_head} does not divide n_embd={n_embd}: "
                             "choose one that does")
        self.block_size, self.vocab_size = block_size, vocab_size
        padded = -(-vocab_size // 64) * 64               # matrices of a multiple of 64 are faster
        self.wte = nn.Embedding(padded, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, n_labels > 0) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.label_emb = nn.Parameter(torch.zeros(n_labels, n_embd)) if n_labels else None
        init_weights(self, n_layer, torch.Generator().manual_seed(seed))

    def hidden(self, tokens, plan=None, sentence_id=None, cache=None):
        """tokens (B, T) -> final hidden states (B, T, C), before they become logits."""
        B, T = tokens.shape
        past = cache.length if cache is not None else 0
        if past + T > self.block_size:
            raise ValueError(f"{past + T} tokens do not fit into block_size={self.block_size}")
        x = self.wte(tokens) + self.wpe.weight[past:past + T]                   # (B, T, C)
        where = None
        if plan is not None:                                 # rows of the flattened plan, (B, T)
            where = sentence_id + plan.shape[1] * torch.arange(B, device=tokens.device)[:, None]
        for block in self.blocks:
            x = block(x, plan=plan, where=where, cache=cache, room=self.block_size)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def forward(self, tokens, targets=None, plan=None, sentence_id=None, cache=None,
                reduction="mean"):
        """tokens (B, T), plan (B, S, C), sentence_id (B, T) -> logits (B, T, V);
        with targets (B, T) the next-token loss in nats, a scalar or, with reduction="none",
        (B, T). A target of -1 counts nothing.
        Raises ValueError where the tokens and the cache exceed block_size."""
        x = self.hidden(tokens, plan, sentence_id, cache)
        if targets is None:
            return F.linear(x, self.wte.weight)[..., :self.vocab_size]  # (B, T, V), tied weights
        if reduction == "mean":
            return MeanCrossEntropy.apply(x.flatten(0, 1), self.wte.weight, targets.flatten(),
                                          self.vocab_size)
        size = chunk(self.wte.weight)
        parts = zip(x.flatten(0, 1).split(size), targets.flatten().split(size))
        loss = [F.cross_entropy(F.linear(part, self.wte.weight)[:, :self.vocab_size], target,
                                ignore_index=-1, reduction="none") for part, target in parts]
        return torch.cat(loss).view_as(targets)
