"""Models leave a run and come back: as a folder, or as a repository of the Hugging Face hub.

    run = open_run("latest", method="mvam")
    run.save_pretrained("folder")              # or run.push_to_hub("somebody/mvam-scenes")
    model = MVAM.from_pretrained("folder")     # on a machine without the data: in eval mode, the same scores
    match(model.run, "dog.jpg", "a dog on grass")[0].score

The folder holds `model.safetensors`, `config.json` (settings, sizes of the data, configurations of the towers, what the
run measured), the tokenizer's files, for a CLIP its image processor, in `network/` the frozen network that makes the
features, and a model card. `huggingface_hub` does the transport. Its `PyTorchModelHubMixin` would write the arguments
of `__init__` into config.json; ours are towers, which JSON cannot say, so a model is built as `rebuild.build` builds
that of a run.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from finematch.config import ParameterError, Settings
from finematch.files import DataError, write_json, write_text

WEIGHTS, CONFIG, NETWORK = "model.safetensors", "config.json", "network"
SAVE_AGAIN = "Save the run again (run.save_pretrained), or download the folder again"
PAPERS = {
    "mvam": "MVAM: Multi-View Attention Method for Fine-grained Image-Text Matching (arXiv 2402.17237)",
    "hslm": "Learning Hierarchical Semantic Correspondences for Cross-Modal Image-Text Retrieval (ICMR 2022)",
    "felga": "FELGA: Unsupervised Fragment Embedding for Fine-Grained Cross-Modal Association (WACV 2024)",
    "slan": "SLAN: Self-Locator Aided Network for Vision-Language Understanding (ICCV 2023)",
}


class Pretrained:
    """Gives the class of a model `from_pretrained`.

    Attributes:
        run: of a model that `from_pretrained` gave: parameters, metrics and digest of the run that trained it. Its
            `data` are the sizes that the model was built of, tokenizer, image processor and frozen network.
    """

    run: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was saved with the model; None for FELGA, whose keywords a frozen model reads."""
        return None if self.run is None else self.run.data.tokenizer

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub: Any) -> Any:
        """The model that `save_pretrained` wrote, in eval mode, on the CPU.

        Args:
            name: a folder, or a repository of the hub, which alone is downloaded.
            hub: of `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir`, `local_files_only` ...

        Raises:
            DataError: A file is missing, damaged or of another model; the message names it and the remedy.
        """
        from finematch.checkpoints import random_states, restore_random_states

        states = (
            random_states()
        )  # the weights that building draws are replaced: nobody's random numbers change
        try:
            return load(_fetch(name, hub), cls)
        finally:
            restore_random_states(states)


# ------------------------------------------------------------------------------------------- out
def save(run, folder: str | Path) -> Path:
    """Write the model of a finished `runs.Run` into a folder; see `Run.save_pretrained`.

    `config.json` is written last: without it a folder is none. Nothing of the machine goes along: of settings that name
    files it has their digests.

    Raises:
        DataError: For a run of a task (captioning ...), whose model stands on another run's.
    """
    from finematch.checkpoints import save_weights
    from finematch.encoders import tower_configs
    from finematch.features.backbones import save_backbone
    from finematch.rebuild import Shape

    folder, model, data = Path(folder).expanduser(), run.model, run.data
    if not isinstance(model, Pretrained):
        raise DataError(run.folder, "the run", f"is of {run.method}: its model stands on another run's",
                        "Save the run that it begins with (its parameter `pretrained`)")  # fmt: skip
    network, sizes = getattr(data, "network", None), [one for one in fields(Shape) if one.type != "Any"]
    shape = {one.name: getattr(data, one.name, one.default) for one in sizes} | tower_configs(model)
    save_weights(model, folder / WEIGHTS)
    for part in (data.tokenizer if run.method != "felga" else None, getattr(data, "processor", None)):
        if part is not None:
            part.save_pretrained(folder)
    if network is not None:
        (folder / NETWORK).mkdir(exist_ok=True)
        save_backbone(network, folder / NETWORK)
    content = {name: value for name, value in run.content.items() if name != "parameters"}
    settings = run.identity.get("settings") or run.settings.identity()
    write_text(folder / "README.md", card(run, has_network=network is not None))
    write_json(folder / CONFIG, {
        "library_name": "finematch", "method": run.method, "settings": settings, "shape": shape,
        "network": network is not None, "run": content,
    })  # fmt: skip
    return folder


def push(
    run, repository: str, *, private: bool | None = None, token: str | bool | None = None, **options
) -> str:
    """Save the model of a run and upload it; see `Run.push_to_hub`. Returns the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(run, folder)
        created = api.create_repo(repository, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=created.repo_id, folder_path=folder, commit_message=f"finematch: {run.method}", **options
        )


def card(run, *, has_network: bool = False) -> str:
    """The model card: what the model is, and where each of its numbers comes from."""
    from huggingface_hub import ModelCardData

    p, content = run.parameters, run.content
    own = str(p["dataset"]).startswith("scenes")
    head = ModelCardData(
        library_name="finematch", license="mit" if own else "other", tags=["image-text-matching", run.method],
        language="en", model_name=f"{run.method.upper()} on {p['dataset']}, scale {p['scale']}",
    )  # fmt: skip
    metrics = "\n".join(f"| {name} | {_number(value)} |" for name, value in run.metrics.items())
    settings = run.identity.get("settings") or run.settings.identity()
    chosen = "\n".join(f"| {name} | {_number(value)} |" for name, value in settings.items())
    data = json.dumps(run.identity.get("data", "not stated"), indent=1)
    features = json.dumps(run.identity.get("features", "not stated"), indent=1)
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    reads = (
        "The frozen network that makes its features of an image is in `network/`." if has_network else
        "It reads frozen features, which are not in here: below stands what made them." if run.method == "felga"
        or not (run.data.clip is not None or run.method == "slan") else "It reads pixels."
    )  # fmt: skip
    said = ("The weights were trained on `scenes`, which finematch draws itself, and have the licence of the code."
            if own else
            f"The weights were trained on `{p['dataset']}`, and networks that others published may have made their "
            "features. Images, captions and such networks have terms of their own: read them before you pass the "
            "weights on.")  # fmt: skip
    labels = "".join(f"\n\n**Note**: {label}." for label in content.get("labels", ()))
    return f"""---
{head.to_yaml()}
---
# {run.method.upper()} on {p["dataset"]}, scale {p["scale"]}

A model of finematch, an independent reproduction of *{PAPERS[run.method]}*. The paper's authors had no part in it.

```python
from finematch import {run.method.upper()}

model = {run.method.upper()}.from_pretrained("<this folder, or its name on the hub>")
```

{reads}{labels}

## Metrics

Protocol: {content["protocol"]}

| metric | value |
|---|---|
{metrics}

## Where it comes from

* **Identity of the run**: `{run.digest or "not stated"}` (status: {run.status})
* **Code**: finematch, commit `{content["commit"]}`
* **Versions**: {versions}
* **Trained on**: {content["device"]}, {content["seconds"]:.0f} s

<details><summary>Digests of the data</summary>

```json
{data}
```
</details>

<details><summary>What made the features</summary>

```json
{features}
```
</details>

<details><summary>Settings</summary>

| setting | value |
|---|---|
{chosen}
</details>

## Licence

The code is under the MIT licence. {said}
"""


def _number(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


# ------------------------------------------------------------------------------------------- back
def _fetch(name: str | Path, hub: dict) -> Path:
    """The folder of a name: where it lies, or the snapshot of a repository of the hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), **hub))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        said = str(error).strip().splitlines()[0].rstrip(".")
        remedy = "Check the name, your network and HF_HUB_OFFLINE, or download the folder first"
        problem = f"is no folder here, and the hub did not give it ({said})"
        raise DataError(name, "the model", problem, remedy) from error


def load(folder: Path, cls: type) -> Any:
    """The model of class `cls` in a folder; see `Pretrained.from_pretrained`."""
    from finematch.checkpoints import TrainingError, load_best
    from finematch.features.backbones import open_backbone
    from finematch.rebuild import build
    from finematch.runs import Run, status_of

    content, file = _config(folder, cls), folder / CONFIG
    method, parameters, of_run = content["method"], content["settings"], content["run"]
    shape = _shape(folder, content)
    try:  # the weights of networks come from here alone
        s = Settings(method, parameters | {name: "" for name in ("vision_weights",) if name in parameters})
        model = build(s, shape)
    except (ParameterError, ValueError, TypeError, AttributeError) as error:
        raise DataError(file, "settings", f"make no model ({error})", SAVE_AGAIN) from error
    if not (folder / WEIGHTS).is_file():
        raise DataError(folder / WEIGHTS, "the weights", "are missing", SAVE_AGAIN)
    try:
        load_best(model, folder / WEIGHTS)
    except TrainingError as error:
        raise DataError(
            folder / WEIGHTS, "the weights", f"are not those of {CONFIG} ({error})", SAVE_AGAIN
        ) from error
    if content["network"]:
        shape.network = open_backbone(folder / NETWORK)
    model.run = Run(method, folder, s.as_dict(), of_run.get("identity", {}), of_run["metrics"], status_of(
        of_run | {"parameters": s.as_dict()}), of_run | {"parameters": s.as_dict()})  # fmt: skip
    model.run.__dict__["_rebuilt"] = shape, model
    return model.eval()


def _config(folder: Path, cls: type) -> dict:
    """The content of config.json, of a model of class `cls`."""
    file, wanted = folder / CONFIG, cls.__name__.lower()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(file, "the file", f"cannot be read ({error.strerror}): {folder} is no model of finematch",
                        "Give a folder that run.save_pretrained wrote") from error  # fmt: skip
    except ValueError as error:
        raise DataError(file, "the file", f"is not JSON ({error})", SAVE_AGAIN) from error
    if not isinstance(content, dict) or "method" not in content:
        raise DataError(file, "method", "is missing: this is no model of finematch",
                        "Give a folder that run.save_pretrained wrote")  # fmt: skip
    if content["method"] != wanted:
        known = ", ".join(name.upper() for name in PAPERS)
        raise DataError(file, "method", f"is {content['method']!r}, not {wanted!r}",
                        f"Open it with the class of its method (one of {known})")  # fmt: skip
    kinds = {"settings": dict, "shape": dict, "network": bool, "run": dict}
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise DataError(file, name, f"is missing, or no {kind.__name__}", SAVE_AGAIN)
    return content


def _shape(folder: Path, content: dict) -> Any:
    """The sizes of config.json, the configurations of towers, the tokenizer and the image processor."""
    from finematch.encoders import open_config
    from finematch.rebuild import Shape

    try:
        sizes = content["shape"]
        shape = Shape(**sizes | {"channels": tuple(sizes.get("channels", ()))})
        shape.clip, shape.bert = (
            None if one is None else open_config(one) for one in (shape.clip, shape.bert)
        )
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(folder / CONFIG, "shape", f"is of another version ({error})", SAVE_AGAIN) from error
    from transformers import AutoImageProcessor, AutoTokenizer

    if shape.words:
        if not (file := folder / "tokenizer.json").is_file():
            raise DataError(file, "the tokenizer", "is missing", SAVE_AGAIN)
        try:
            shape.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except Exception as error:  # the readers raise whatever they like
            raise DataError(file, "the tokenizer", f"cannot be read ({error})", SAVE_AGAIN) from error
        if len(shape.tokenizer) != shape.words:
            raise DataError(file, "the tokenizer", f"has {len(shape.tokenizer)} words, config.json says {shape.words}",
                            SAVE_AGAIN)  # fmt: skip
    if shape.clip is not None:
        shape.processor = AutoImageProcessor.from_pretrained(str(folder))
    return shape
