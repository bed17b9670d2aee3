"""`python hub_target.py METHOD FOLDER BATCH` opens a saved model, without any data; its answers go beside BATCH."""

import sys
from pathlib import Path

import torch

import finematch


@torch.no_grad()
def answers(model, batch: dict) -> list[torch.Tensor]:
    """What a model says of a batch: its scores, as the method ranks by them."""
    kind, image, text = type(model).__name__, batch["image"], batch["text"]
    if kind == "FELGA":
        return [model.encode_regions(image["features"]), model.encode_words(text["features"])]
    if kind == "HSLM":
        from finematch.models.hslm import tile_scores

        def rows(part):
            return lambda index: {name: value[torch.as_tensor(index)] for name, value in part.items()}

        every = torch.arange(len(text["mask"]))
        return [tile_scores(model, rows(image), rows(text))(every, every)]
    one, other = model.encode_image(**image), model.encode_text(**text)
    found = [other.vector @ one.vector.T]
    return found if getattr(model, "head", None) is None else [*found, model.match(one, other)]


if __name__ == "__main__":
    method, folder, file = sys.argv[1:]
    loaded = getattr(finematch, method.upper()).from_pretrained(folder)
    assert not loaded.training
    torch.save(answers(loaded, torch.load(file)), Path(file).with_name("answers.pt"))
