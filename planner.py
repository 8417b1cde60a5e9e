"""The planner: from the sentences so far, a distribution over the label of the next one (step 3);
and `PlannedGPT`, which joins planner, mixture and GPT into the module that is trained and scored.

NOTE(paper): the paper's planner encodes sentences with a pretrained encoder; ours reads the vectors
of labels.py, so that everything is trained from scratch.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Batch
from model import END_TO_END, GPT, NO_PLANNER, Block, init_weights, mix_labels


class Planner(nn.Module):
    """A causal transformer over sentence vectors: slot j predicts the label of sentence j from the
    vectors of the sentences before it."""

    def __init__(self, n_vector: int, n_labels: int, n_layer: int, n_head: int, n_embd: int,
                 seed: int = 0):
        super().__init__()
        self.inp = nn.Linear(n_vector, n_embd, bias=False)
        self.start = nn.Parameter(torch.zeros(n_embd))  # stands in for "nothing yet"
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, n_labels, bias=False)                 # C -> K
        init_weights(self, n_layer, seed)

    def forward(self, vectors: torch.Tensor, first: torch.Tensor, n_last: int = 0) -> torch.Tensor:
        """vectors (B, P, E) of length 1, first (B, P) bool -> label logits (B, P, K), or of the
        last n_last slots alone. Slot j reads the vectors of slots i < j, back to the last slot <= j
        that is marked `first`: there the view starts anew (a document, or what may be seen)."""
        x = self.inp(vectors * vectors.shape[-1] ** 0.5)    # entries of size about one
        x = F.pad(x, (0, 0, 1, -1))                     # slot j reads the vector of sentence j - 1
        x = torch.where(first[..., None], self.start.to(x.dtype), x)        # (B, P, C)
        slot = torch.arange(first.shape[1], device=first.device)
        opening = torch.where(first, slot, 0).cummax(1).values      # (B, P) where its view began
        # A slot sees the slots of its own view up to itself; padding sees itself, not nothing.
        mask = (opening[:, :, None] == opening[:, None, :]).tril()          # (B, P, P)
        for block in self.blocks:
            x = block(x, mask=mask[:, None])                                # (B, P, C)
        x = x[:, -n_last:]                              # the others were context; -0 keeps all
        return self.head(self.ln_f(x))                                      # (B, n_last or P, K)


def label_loss(label_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of logits (B, S, K) against labels (B, S); -1 counts nothing."""
    return F.cross_entropy(label_logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-1)


class PlannedGPT(nn.Module):
    """A GPT under one of the plans, with a planner where the plan asks for one."""

    def __init__(self, gpt: GPT, planner: Planner | None, plan: str, tau: float = 1.0):
        super().__init__()
        self.gpt = gpt
        self.planner = None if plan in NO_PLANNER else planner
        self.plan = plan
        self.tau = tau
        if self.planner is not None and plan not in END_TO_END:
            self.planner.requires_grad_(False)          # not even weight decay moves it

    def plan_rows(self, batch: Batch, generator: torch.Generator | None = None):
        """The plan of each sentence that the targets touch, (B, S, C), and the planner's logits
        (B, S, K); None and None under `none`."""
        if self.plan == "none":
            return None, None
        n_last = batch.labels.shape[1]
        if self.planner is None:                        # these plans look at no logits
            K = len(self.gpt.label_emb)
            label_logits = batch.vectors.new_zeros(*batch.labels.shape, K)  # (B, S, K)
        else:                                           # step 3: what comes next
            label_logits = self.planner(batch.vectors, batch.first, n_last)
        rows = mix_labels(label_logits, self.gpt.label_emb, self.plan, batch.labels,
                          batch.previous, self.tau, generator)              # (B, S, C)
        return rows, label_logits

    def forward(self, batch: Batch, generator: torch.Generator | None = None,
                reduction: str = "mean"):
        """-> the next-token loss (a scalar, or (B, T)), and label logits (B, S, K) or None."""
        rows, label_logits = self.plan_rows(batch, generator)
        # Step 5: under an END_TO_END plan, this loss has a gradient to the planner through rows.
        lm_loss = self.gpt(batch.tokens, batch.targets, rows, batch.sentence_id, reduction)
        return lm_loss, label_logits
