"""The GPT, and the one function that this project is about: `mix_labels`.

Shapes, here and everywhere: B batch, T tokens, S sentences, K labels, C model width,
E sentence-vector width, V vocabulary, H heads, D head width.

The GPT is GPT-2 (Radford et al., 2019) without dropout, with biases in its norms alone, the exact
GELU, which torch computes faster, rotary positions (worth little at T = 64), and a norm behind the
token embedding (worth 0.11 nats, see results/README.md). Step 4: in every block a linear map of the
plan, zero at the start, is added to the attention output, before its projection.
"""
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# The README's table says what each plan is for. A new one is a name here and a branch in
# mix_labels. In END_TO_END the LM loss trains the planner, and those in NO_PLANNER have none.
PLANS = ("none", "fixed", "previous", "hard", "straight_through", "gumbel", "soft_frozen", "soft",
         "oracle")
END_TO_END = ("straight_through", "gumbel", "soft")
NO_PLANNER = ("none", "fixed", "previous", "oracle")


def mix_labels(label_logits: torch.Tensor, label_emb: torch.Tensor, plan: str,
               labels: torch.Tensor | None = None, previous: torch.Tensor | None = None,
               tau: float = 1.0, generator: torch.Generator | None = None) -> torch.Tensor:
    """The planner's logits (B, S, K) and the label embeddings (K, C) -> plan rows (B, S, C).

    labels and previous, (B, S), are the labels of each sentence and of the one before it, -1 where
    there is none; only `oracle` and `previous` look at them. `gumbel` draws its noise from the
    generator, at temperature tau; without a generator it is `soft`.
    Source: "End-to-end Planner Training for Language Modeling", arXiv 2410.12492.
    Raises ValueError for a plan that mixes nothing.
    """
    # Steps 4 and 5: the plan of a sentence is a mixture of the label embeddings.
    K = label_emb.shape[0]
    probs = label_logits.softmax(-1)                                        # (B, S, K)
    likeliest = one_hot(label_logits.argmax(-1), K)                         # (B, S, K)

    if plan == "fixed":                 # always label 0: the same parameters, no information
        weights = one_hot(torch.zeros_like(probs[..., 0]), K)
    elif plan == "previous":            # a memory without a prediction
        weights = one_hot(previous, K)
    elif plan == "hard":                # the earlier paper: argmax has no gradient
        weights = likeliest
    elif plan == "straight_through":    # forward `hard` (the bracket is 0), backward `soft`
        weights = likeliest + (probs - probs.detach())
    elif plan == "gumbel":              # a relaxed sample: exact gradients of a noisy mixture
        weights = probs
        if generator is not None:
            weights = ((label_logits + gumbel_noise(label_logits, generator)) / tau).softmax(-1)
    elif plan == "soft_frozen":         # the whole distribution, but the planner learns nothing
        weights = probs.detach()
    elif plan == "soft":                # the method: differentiable in the planner's logits
        weights = probs
    elif plan == "oracle":              # the true label: what a perfect planner would give
        weights = one_hot(labels, K)
    else:
        raise ValueError(f"plan={plan} mixes no labels: choose one of {', '.join(PLANS[1:])}")

    return weights.to(label_emb.dtype) @ label_emb                          # (B, S, C)


def one_hot(index: torch.Tensor, K: int) -> torch.Tensor:
    """(B, S) -> (B, S, K): 1 at each index, and a row of zeros for an index of -1."""
    return (index[..., None] == torch.arange(K, device=index.device)).float()


def gumbel_noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """-log(-log(u)) for uniform u, in the shape of `like`."""
    uniform = torch.rand(like.shape, generator=generator, device=generator.device)
    uniform = uniform.clamp(1e-6, 1 - 1e-6)     # in bfloat16 this would be 1, the noise infinite
    return -(-uniform.log()).log().to(like)


def attend(q, k, v, mask: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v for q, k, v (B, H, T, D); causal, or where mask (B, 1, T, T)."""
    if q.device.type != "cpu" or k.shape[2] > 512:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    # On a CPU torch's fused kernel, made for long rows, is five times slower than this at T = 64.
    if mask is None:
        mask = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = (q * q.shape[-1] ** -0.5) @ k.mT                               # (B, H, T, T)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


@functools.lru_cache(maxsize=16)        # made once for each shape; compiled code has its own
def rotary_table(T: int, D: int, device, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (T, D) of the angle by which position t turns the pair (i, i + D/2) of entries:
    by t for i = 0, and more and more slowly for the others."""
    exact = torch.promote_types(dtype, torch.float32)       # not in bfloat16
    slower = 10_000 ** -(torch.arange(D // 2, device=device, dtype=exact) / (D // 2))   # (D/2,)
    angle = torch.arange(T, device=device)[:, None] * slower                # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], 1).to(dtype), torch.cat([-sin, sin], 1).to(dtype)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, D), each position turned by its own angles: the product of a query and a key then
    depends on their distance, not on where they are. Source: RoPE, Su et al., arXiv 2104.09864."""
    cos, sin = rotary_table(x.shape[2], x.shape[3], x.device, x.dtype)
    return x * cos + x.roll(x.shape[3] // 2, -1) * sin


class Attention(nn.Module):
    """Causal self-attention. With `planned`, a map of the plan is added to its output."""

    def __init__(self, n_embd: int, n_head: int, planned: bool = False):
        super().__init__()
        self.n_head = n_head                                                # H, and D = C / H
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        self.plan_map = nn.Linear(n_embd, n_embd, bias=False) if planned else None

    def forward(self, x, plan_rows=None, row_of_token=None, mask=None):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)      # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, T, D) each
        y = attend(rotate(q), rotate(k), v, mask).transpose(1, 2).reshape(B, T, C)
        if plan_rows is not None:
            # Map the S rows first and look them up for the T tokens afterwards: S << T.
            mapped = self.plan_map(plan_rows).flatten(0, 1)                 # (B*S, C)
            y = y + F.embedding(row_of_token, mapped)                       # (B, T, C)
        return self.proj(y)             # behind the plan: attention and plan are mapped together


class Block(nn.Module):
    """A pre-norm transformer block; the planner's are the same, without a plan."""

    def __init__(self, n_embd: int, n_head: int, planned: bool = False):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head, planned)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)                 # C -> 4C
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x, plan_rows=None, row_of_token=None, mask=None):
        x = x + self.attn(self.ln_1(x), plan_rows, row_of_token, mask)
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


def init_weights(module: nn.Module, n_layer: int, seed: int) -> None:
    """GPT-2's start: N(0, 0.02^2), narrower by sqrt(2 n_layer) for what is added to the residual
    stream. Plan maps are 0, so that all plans begin with the same loss."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if "plan_map" in name:          # while these are 0, label_emb and planner have no gradient
            nn.init.zeros_(p)
        elif p.dim() >= 2:
            residual = name.endswith(("proj.weight", "down.weight"))
            std = 0.02 / math.sqrt(2 * n_layer) if residual else 0.02
            nn.init.normal_(p, std=std, generator=generator)


class GPT(nn.Module):
    """A small GPT; n_head divides n_embd. With n_labels > 0 it takes a plan."""

    def __init__(self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int,
                 n_labels: int = 0, seed: int = 0):
        super().__init__()
        self.block_size = block_size                    # T at most
        self.vocab_size = vocab_size
        padded = 64 * math.ceil(vocab_size / 64)        # such matrices are faster on a GPU
        self.wte = nn.Embedding(padded, n_embd)         # tokens, and the output matrix, too
        self.blocks = nn.ModuleList(Block(n_embd, n_head, n_labels > 0) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.label_emb = nn.Parameter(torch.zeros(n_labels, n_embd)) if n_labels else None
        init_weights(self, n_layer, seed)

    def forward(self, tokens, targets=None, plan=None, sentence_id=None, reduction="mean"):
        """tokens (B, T), plan rows (B, S, C) and the row of each token, sentence_id (B, T)
        -> logits (B, T, V); with targets (B, T) instead the next-token loss in nats: a scalar, or
        (B, T) with reduction="none". A target of -1 counts nothing.
        Raises ValueError for more than block_size tokens."""
        B, T = tokens.shape
        if T > self.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={self.block_size}")
        row_of_token = None
        if plan is not None:                            # in the plan rows of all windows, (B*S, C)
            first_row = plan.shape[1] * torch.arange(B, device=tokens.device)
            row_of_token = first_row[:, None] + sentence_id                 # (B, T)
        x = self.wte(tokens)                                                # (B, T, C)
        x = F.layer_norm(x, x.shape[-1:])               # else the blocks drown its entries of 0.02
        for block in self.blocks:
            x = block(x, plan, row_of_token)
        x = self.ln_f(x)                                                    # (B, T, C)
        if targets is None:
            return self.logits(x)                                           # (B, T, V)
        return self.loss(x, targets, reduction)

    def logits(self, x):
        """(..., C) -> (..., V). The output matrix is the token embedding."""
        return F.linear(x, self.wte.weight)[..., :self.vocab_size]

    def loss(self, x, targets, reduction):
        """x (B, T, C), targets (B, T) -> as `forward`. A few rows at a time: on a CPU the logits of
        so many stay in its cache."""
        rows = max(1, (1 << 19 if x.device.type == "cpu" else 1 << 28) // self.vocab_size)
        parts = zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows))
        losses = torch.cat([F.cross_entropy(self.logits(x_part), t_part, ignore_index=-1,
                                            reduction="none") for x_part, t_part in parts])
        if reduction == "none":
            return losses.view(targets.shape)                               # (B, T)
        return losses.sum() / (targets >= 0).sum().clamp(min=1)
