"""Cases for the Triton kernels: single blocks of logits, and selections of those of log-probabilities."""

from __future__ import annotations

import dataclasses

import torch

from nemo_rao.ops.logit_blocks import LogitBlocks, Tokens

from . import test_linear_log_probs, test_vocab_parallel

LINEAR_CASES = {
    name: dataclasses.replace(test_linear_log_probs.CASES[name], dtype=dtype)
    for name, dtype in {
        "no token": torch.float32,
        "ranks with nothing but padding": torch.float32,
        "masked, NaN elsewhere": torch.float32,
        "low rank, masked": torch.float32,
        "sequence parallel, low rank": torch.float32,
        "large logits, float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }.items()
}
VOCAB_CASES = {
    name: test_vocab_parallel.CASES[name]
    for name in (
        "strided vocabulary",
        "padded, transposed, masked",
        "ranks with nothing but padding",
        "bfloat16",
        "float16",
        "extreme",
    )
}


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of logits, in the middle of a vocabulary."""

    num_rows: int
    num_columns: int
    logits_dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype = torch.bfloat16
    row_stride: int | None = None  # elements; None: rows are adjacent
    scale: float = 3.0
    first_column: int = 1000

    def make(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Logits as they lie in memory, targets (some outside the block), statistics so far, upstream gradient."""
        generator = torch.Generator().manual_seed(3)
        stride = self.row_stride or self.num_columns
        memory = torch.full((self.num_rows, stride), torch.nan, dtype=self.logits_dtype)
        logits = memory[:, : self.num_columns]
        logits.copy_(self.scale * torch.randn(self.num_rows, self.num_columns, generator=generator))
        if self.num_columns > 1:
            logits[:1, 0] = -torch.inf
        targets = torch.randint(-2, self.num_columns + 2, (self.num_rows,), generator=generator) + self.first_column
        targets[-1:] = self.first_column + self.num_columns - 1
        statistics = torch.randn(self.num_rows, 3, generator=generator).abs_()
        statistics[:1] = torch.tensor([torch.finfo(torch.float32).min, 0, 0])  # over no column
        upstream = torch.randn(self.num_rows, generator=generator)
        return {
            "logits": memory.to(device)[:, : self.num_columns],
            "targets": targets.to(device),
            "statistics": statistics.to(device),
            "upstream": upstream.to(device),
        }


BLOCKS = {
    "one column": Block(5, 1),
    "fewer columns than a program's": Block(7, 37),
    "as many columns as a program's": Block(2, 4096),
    "one column more": Block(3, 4097),
    "several programs a row, aligned rows": Block(3, 9001, row_stride=9008),
    "16 bits": Block(3, 2050, logits_dtype=torch.bfloat16),
    "into float32": Block(3, 515, out_dtype=torch.float32),
    "into float16": Block(3, 515, out_dtype=torch.float16),
    "large logits": Block(4, 700, scale=1e4),
    "no row": Block(0, 5),
}


def of_block(block: Block, compute: LogitBlocks, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Statistics after the block, and its gradient under these."""
    inputs = block.make(device)
    dtype = block.logits_dtype if compute.reads_16_bits else torch.float32
    statistics = inputs["statistics"]

    def logits() -> torch.Tensor:
        """Anew, as PyTorch's way overwrites it; with the rows as far apart."""
        return block.make(device)["logits"] if dtype == block.logits_dtype else inputs["logits"].to(dtype)

    compute.add_to_statistics(statistics, logits(), inputs["targets"], first_column=block.first_column)
    # Behind the columns, memory that must stay as it is.
    memory = torch.full((len(statistics), block.num_columns + 3), 7.0, dtype=block.out_dtype, device=device)
    compute.gradient(
        logits(),
        Tokens(inputs["targets"], statistics[:, 0], statistics[:, 1], inputs["upstream"]),
        out_nc=memory[:, : block.num_columns],
        first_column=block.first_column,
    )
    assert bool((memory[:, block.num_columns :] == 7).all())
    return {"statistics": statistics.cpu(), "gradient": memory[:, : block.num_columns].float().cpu()}


def expected_of(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, 3]`` statistics, and the gradient, by their definitions in float64."""
    inputs = block.make()
    logits, (largest, total, target_logit) = inputs["logits"].double(), inputs["statistics"].double().unbind(-1)
    column = inputs["targets"] - block.first_column
    of_target = torch.arange(block.num_columns) == column[:, None]
    new_largest = torch.maximum(largest, logits.amax(-1))
    total = total * (largest - new_largest).exp() + (logits - new_largest[:, None]).exp().sum(-1)
    target_logit = target_logit + logits.masked_fill(~of_target, 0).sum(-1)
    softmax = (logits - new_largest[:, None]).exp() / total[:, None]
    gradient = inputs["upstream"].double()[:, None] * (of_target.double() - softmax)
    return torch.stack([new_largest, total, target_logit], -1), gradient
