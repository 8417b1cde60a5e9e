"""The planner: from the sentences so far, a distribution over the label of the next one
(DESIGN step 3); and `PlannedGPT`, which joins planner, mixture and GPT into the one module
that is trained and evaluated.

NOTE(paper): the paper's planner encodes sentences with a pretrained encoder; ours reads the vectors
of labels.py, so that everything is trained from scratch.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Batch
from model import END_TO_END, GPT, USES_PLANNER, Block, init_weights, mix_labels


class Planner(nn.Module):
    """A causal transformer over sentence vectors. Slot j predicts sentence j's label and reads
    sentence j - 1's vector; where the view starts anew it reads a learned start vector and
    sees nothing earlier."""

    def __init__(self, n_vector: int, n_labels: int, n_layer: int, n_head: int, n_embd: int,
                 reach: int, seed: int = 0):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"planner_head={n_head} does not divide planner_embd={n_embd}: "
                             "choose one that does")
        self.inp = nn.Linear(n_vector, n_embd, bias=False)
        self.start = nn.Parameter(torch.zeros(1, n_embd))
        self.wpe = nn.Embedding(reach + 1, n_embd)       # later sentences share the last position
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, n_labels, bias=False)
        init_weights(self, n_layer, torch.Generator().manual_seed(seed))

    def forward(self, vectors: torch.Tensor, first: torch.Tensor,
                slots: torch.Tensor | None = None) -> torch.Tensor:
        """vectors (B, S, E) of unit length, first (B, S) bool -> label logits (B, S, K); with
        `slots`, indices of any shape into the B*S slots, logits of those alone, (..., K).
        Slot j depends on the vectors of sentences i < j alone, back to the last slot <= j
        that is marked `first`."""
        x = self.inp(vectors * vectors.shape[-1] ** 0.5)  # entries of size about one, as the GPT's
        x = torch.cat([self.start.expand(len(x), 1, -1).to(x), x[:, :-1]], dim=1)       # (B, S, C)
        x = torch.where(first[..., None], self.start.to(x), x)
        slot = torch.arange(first.shape[1], device=first.device)
        opening = torch.where(first, slot, 0).cummax(1).values          # (B, S) where a view began
        x = x + self.wpe((slot - opening).clamp(max=self.wpe.num_embeddings - 1))
        seen = (opening[:, :, None] == opening[:, None, :]).tril()      # (B, S, S)
        for block in self.blocks:
            x = block(x, mask=seen[:, None])
        if slots is not None:
            x = F.embedding(slots, x.flatten(0, 1))
        return self.head(self.ln_f(x))


def label_loss(label_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of logits (B, S, K) against labels (B, S); -1 counts nothing."""
    return F.cross_entropy(label_logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-1)


class PlannedGPT(nn.Module):
    """The GPT under one of the nine plans, as far as the planner is needed for it."""

    def __init__(self, gpt: GPT, planner: Planner | None, plan: str, tau: float = 1.0):
        super().__init__()
        self.gpt, self.plan, self.tau = gpt, plan, tau
        self.planner = planner if plan in USES_PLANNER else None
        for name, p in self.named_parameters():          # what a plan does not use is not trained
            part_of_plan = "label_emb" in name or "plan_map" in name
            frozen = name.startswith("planner.") and plan not in END_TO_END
            p.requires_grad_(not frozen and not (part_of_plan and plan == "none"))

    def label_logits(self, batch: Batch) -> torch.Tensor:
        """(B, S, K): the planner's logits for the sentences that the targets touch."""
        if self.planner is None:
            return batch.vectors.new_zeros(*batch.slots.shape, len(self.gpt.label_emb))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.plan in END_TO_END):
            return self.planner(batch.vectors, batch.first, batch.slots)

    def rows(self, batch: Batch, generator: torch.Generator | None = None):
        """The plan's rows (B, S, C) and the label logits (B, S, K);
        None and None for the plan `none`."""
        if self.plan == "none":
            return None, None
        logits = self.label_logits(batch)
        rows = mix_labels(logits, self.gpt.label_emb, self.plan, batch.labels, self.tau, generator)
        return rows, logits

    def forward(self, batch: Batch, generator: torch.Generator | None = None,
                reduction: str = "mean"):
        """-> next-token loss (a scalar, or (B, T)), and label logits (B, S, K) or None."""
        rows, logits = self.rows(batch, generator)
        loss = self.gpt(batch.tokens, batch.targets, rows, batch.sentence_id, reduction=reduction)
        return loss, logits
