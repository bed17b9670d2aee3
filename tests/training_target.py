"""A small run for test_training.py, started as a process of its own.

`python training_target.py OUT [SLEEP]` trains and prints a digest of the weights (killed and resumed from outside).
`torchrun ... training_target.py OUT parallel [DROPOUT [STOP]]` leaves each process's weights in OUT, or its checkpoints
where it is broken off after STOP batches.
"""

import sys

import torch

from finematch.training import Plan, fit, seed_everything


class Toy(torch.nn.Module):
    """Two layers with dropout, so that the random state matters at every step."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Dropout(0.3), torch.nn.Linear(32, 4))

    def forward(self, batch):
        error = (self.net(batch["x"]) - batch["y"]).square().mean()
        return {"error": error, "loss": error}


class Data:
    """64 fixed items; index gather."""

    def __init__(self, n=64):
        g = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(n, 8, generator=g), torch.randn(n, 4, generator=g)

    def __len__(self):
        return len(self.x)

    def __getitems__(self, index):
        return {"x": self.x[index], "y": self.y[index]}


def plan(**changes):
    return Plan(**{"epochs": 4, "batch_size": 8, "lr": 1e-2, "warmup": 0.1, "clip_norm": 1.0, "checkpoint_steps": 3,
                   **changes})  # fmt: skip


def digest(model):
    return {k: v.double().sum().item().hex() for k, v in model.state_dict().items()}


def main(out, sleep=0.0):
    import time

    seed_everything(0)
    model = Toy()

    class Slow(Data):
        def __getitems__(self, index):
            time.sleep(sleep)
            print("batch", flush=True)
            return super().__getitems__(index)

    def evaluate(m):
        x = Data()
        return {"rsum": -float((m.net(x.x) - x.y).square().mean())}

    summary = fit(model, Slow(), plan(), out, evaluate=evaluate, echo=None)
    losses = [(line["epoch"], line["loss"].hex(), line["rsum"].hex()) for line in summary["history"]]
    print("END", digest(model), losses, summary["best_epoch"], flush=True)


def parallel(out, dropout=0.0, stop=None):
    from accelerate import PartialState

    seed_everything(0)
    model = Toy()
    model.net[1].p = dropout

    class Stops(Data):
        left = stop

        def __getitems__(self, index):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = self.left and self.left - 1
            return super().__getitems__(index)

    state = PartialState(cpu=True)
    try:
        fit(model, Stops(), plan(epochs=2), out, echo=None)
    except KeyboardInterrupt:
        return
    torch.save(model.state_dict(), f"{out}/weights{state.process_index}.pt")


if __name__ == "__main__":
    if sys.argv[2:3] == ["parallel"]:
        parallel(sys.argv[1], *(kind(value) for kind, value in zip((float, int), sys.argv[3:], strict=False)))
    else:
        main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
