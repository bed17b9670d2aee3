# %% [markdown]
# # MVAM: what the views look at
#
# **Paper** *MVAM: Multi-View Attention Method for Fine-grained Image-Text Matching* (arXiv 2402.17237). This
# notebook serves Figure 3 (the attention of every view), Figure 4 (retrieved pictures) and section 4.6.4,
# whose claim it measures:
#
# > "Further analysis reveals a one-to-one mapping relationship between the attention maps of image and text
# > across different views."
#
# It needs a finished run of `mvam/2_train` and trains nothing.
#
# | on | cost, one core |
# |---|---|
# | a smoke run | seconds |
# | scenes, 500 test pictures | about half a minute, 1.5 GB |
# | Flickr8k, 1,000 photos | about a minute, 1.5 GB |
#
# **Expected** The retrieval numbers of the run come back from its weights, and an assert holds them together.
# What the views do is printed as measured; the paper gives one example and no numbers, so there is nothing to
# match but the claim itself.

# %% tags=["parameters"]
run: str = "latest"  # folder of the run to look into; latest: the newest that has finished
compare: str = ""  # folder of the same run without diversity loss; empty skips the comparison
beside: str = ""  # folder of a run of another pooling, for Figure 4 with two models; empty skips it
example: int = 0  # number of the caption (of the reported split) whose views are drawn
dataset: str = ""  # empty, or the run's own dataset; another one is refused
data_root: str = ""  # folder above the dataset's own; empty is the run's
scale: str = ""  # empty, or the run's own scale; another one is refused
seed: int = 0  # of the shuffles that chance is measured by
out: str = "papermill_runs/mvam_attention"  # folder of metrics.json
figures: str = "figures"  # folder of the figures; those that show photos go to `out` instead
smoke: bool = False  # fewer shuffles, and `.smoke.` in the figures' names

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(globals(), example=(0, 10**7), seed=(0, 2**31))

# %%
import textwrap
import time

import numpy as np
import torch
from matplotlib import pyplot as plt

from finematch import figures as draw
from finematch.boxes import grid_boxes
from finematch.data import load
from finematch.data.record import DataError
from finematch.scenes.generator import attributes
from finematch.scenes.language import solutions
from finematch.evaluation.correspondence import correspondence, inside, on_span, pieces
from finematch.evaluation.retrieval import retrieval
from finematch.models.configs import MVAMConfig
from finematch.models.mvam import view_statistics
from finematch.runs import Run, open_run, write_metrics
from finematch.evaluation.embedding import embed

draw.style()
started = time.monotonic()


# %% [markdown]
# ## A run comes back
#
# `metrics.json` holds the settings that a run was made with, `best.safetensors` the weights of its best epoch. With both, data and model are the
# same again.


# %%
def reopen(folder: str) -> Run:
    """A finished run that has views to show."""
    found = open_run(folder, method="mvam", smoke=p.smoke) if folder == "latest" else open_run(folder)
    was = found.parameters
    for name in ("dataset", "scale"):
        if getattr(p, name) not in ("", was[name]):
            raise ValueError(f"{name} = {getattr(p, name)!r}, but {folder} was trained with {was[name]!r}")
    if was["ensemble"] > 1 or was["pooling"] not in ("mvam", "attention"):
        raise ValueError(
            f"{folder} has no views to show: pooling={was['pooling']}, ensemble={was['ensemble']}"
        )
    if p.data_root:
        was["data_root"] = p.data_root
    return found


run = reopen(p.run)
of_run, model, data = run.parameters, run.model.cpu(), run.data
split, v, tokenizer = data.splits[data.reported], model.views, data.tokenizer
if v < 2:
    raise ValueError(f"{p.run} has one view: give a run with pooling=mvam and views=2 or more")
name = f"mvam_attention.{of_run['dataset']}" + (".smoke" if p.smoke or of_run["smoke"] else "")
label = f"{of_run['dataset']} {data.reported}, {of_run['backbone']}, {v} views"
print(f"{label}: {len(split.records)} pictures, {len(split.captions)} captions; "
      f"diversity loss {of_run['diversity']}, best epoch {run.metrics['best_epoch']}")  # fmt: skip


def keep(figure: plt.Figure, number: int, *, pictures: bool = False) -> None:
    """Save a figure of this notebook as SVG and PNG; one that shows photos stays in the run's folder.

    `figures` is published with the project. Photos belong to those who took them, drawn scenes to nobody.
    """
    folder = p.out if pictures and not of_run["dataset"].startswith("scenes") else p.figures
    for kind in ("svg", "png"):
        draw.save(figure, root() / folder / f"{name}.{number}.{kind}")


# %% [markdown]
# Are these the weights that the numbers came from? The retrieval is scored again and must give the numbers of
# the run.

# %%
image, text = embed(model, split)
again = retrieval(image, text, split.image_of)
for key in ("i2t_r1", "t2i_r1", "rsum"):
    assert abs(again[key] - run.metrics[key]) < 1.0, (key, again[key], run.metrics[key])
chance = 100 / len(split.records)
print(f"text to image R@1 {again['t2i_r1']:.1f} %, R@5 {again['t2i_r5']:.1f} % "
      f"(chance {chance:.1f} and {5 * chance:.1f} %)")  # fmt: skip
if again["t2i_r5"] < 10 * chance:
    print("NOTE: this run has hardly learned anything; read its maps as those of a random model.")


# %% [markdown]
# ## The attention of a split
#
# For every picture the weights of each view on its tokens, "v n", and the same for every caption. The first
# token of a picture may be [IMG], which lies nowhere in the picture: its weight is stated, not drawn.


# %%
@torch.no_grad()
def attend(encode, source, block: int = 100) -> list[torch.Tensor]:
    """Attention "v n" of every item of a source; n without padding."""
    found = []
    for i in range(0, len(source), block):
        batch = source.batch(range(i, min(i + block, len(source))))
        real = batch["mask"].sum(1) if "input_ids" in batch or "special" in batch else None
        for k, one in enumerate(encode(**batch).attention):
            found.append(one if real is None else one[:, : real[k]])
    return found


on_image = attend(model.encode_image, split.images)
on_text = attend(model.encode_text, split.texts)
places = getattr(split.images, "places", None)
if places is not None:
    where = [torch.from_numpy(row[:, :4]) for row in places]
elif of_run["backbone"] == "clip":
    cells = round((on_image[0].shape[1] - 1) ** 0.5)
    where = [grid_boxes(1, 1, cells, cells)] * len(on_image)
else:
    raise DataError(
        p.run, "its features", "have no boxes: no map can be drawn", "Give a run on other features"
    )
extra = on_image[0].shape[1] - len(where[0])  # tokens before the first box: [IMG]
assert extra in (0, 1)
for one in (*on_image, *on_text):
    assert torch.allclose(one.sum(1), torch.ones(v), atol=1e-4)  # Eq. 7: a softmax a view


def on_words(c: int) -> tuple[list[str], np.ndarray]:
    """The words of caption c, and the weight "v words" of each view on each."""
    cut = pieces(split.captions[c], tokenizer)
    assert len(cut.word_of) == on_text[c].shape[1]
    weights = np.zeros((v, len(cut.words)))
    np.add.at(weights.T, cut.word_of, on_text[c].numpy().T)
    return cut.words, weights


# %% [markdown]
# ## Figure 3: each view of a picture, beside the same view of its caption
#
# The caption is the one that `example` names: the first of the split, unless you ask for another. Each map
# and each caption has its own scale, up to its maximum, or to three times its mean if the maximum is lower: a
# view that spreads evenly stays pale. The entropy in the title says it in a number: 0 is one token, 1 is all
# alike.
#
# One caution. A token is not a patch of pixels: the Transformer below has mixed every token with all the
# others. A view that looks at a region takes what the network wrote there.

# %%
c = min(p.example, len(split.captions) - 1)
i = int(split.image_of[c])
picture = split.records[i].open()
size = torch.tensor([*picture.size, *picture.size])
words, shades = on_words(c)


def sharpness(weights: torch.Tensor) -> np.ndarray:
    """Entropy of each view of one item, over that of a uniform one."""
    return view_statistics(weights[None], weights[None].amax(1) > 0)[0].numpy()


sharp = sharpness(on_image[i]), sharpness(on_text[c])
columns = min(v, 4)
rows = -(-v // columns)
figure = plt.figure(figsize=(3.05 * columns, 1.42 * rows + 1.5))
grid = figure.add_gridspec(
    rows + 1, 2 * columns, width_ratios=[1.15, 1.65] * columns, height_ratios=[1.1] + [1] * rows,
    hspace=0.34, wspace=0.06, left=0.01, right=0.99, top=0.95, bottom=0.02,
)  # fmt: skip
draw.show_picture(figure.add_subplot(grid[0, 0]), picture)
head = figure.add_subplot(grid[0, 1:])
head.set_axis_off()
head.text(0.01, 0.95, draw.plain(split.captions[c]), fontsize=12, va="top", transform=head.transAxes)
legend = textwrap.fill(
    f"Caption {c} of {label}. Each view on the picture, and beside it the same view on the words. Lit cells and "
    "dark words carry weight, each on its own scale. H is the entropy: 1 is uniform.", 30 * columns,
)  # fmt: skip
head.text(0.01, 0.62, legend, fontsize=8, va="top", linespacing=1.5, transform=head.transAxes)
for k in range(v):
    row, column = divmod(k, columns)
    ax = figure.add_subplot(grid[row + 1, 2 * column])
    weights = on_image[i][k]
    draw.show_attention(ax, picture, (where[i] * size).numpy(), weights[extra:].numpy())
    ax.set_title(f"view {k + 1}   H {sharp[0][k]:.2f}", fontsize=7.5, pad=2)
    if extra and weights[0] >= 0.005:
        ax.text(0, -0.02, f"{weights[0]:.0%} on [IMG]", fontsize=5.5, va="top", transform=ax.transAxes)
    ax = figure.add_subplot(grid[row + 1, 2 * column + 1])
    draw.show_words(ax, words, shades[k], size=7.5)
    ax.set_title(f"H {sharp[1][k]:.2f}", fontsize=7.5, pad=2)
keep(figure, 1, pictures=True)

# %% [markdown]
# ## How much do the views overlap?
#
# Overlap of views v and w: $\sum_n \sqrt{A_{vn} A_{wn}}$, averaged over the split; 1 means the same weights,
# 0 nothing in common. It is the matrix that Eq. 11 pulls to the identity; Eq. 10 does so without the root.


# %%
def statistics(attention: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Entropy "v" and overlap "v v", over all items."""
    padded = torch.nn.utils.rnn.pad_sequence([one.T for one in attention], batch_first=True).transpose(1, 2)
    return tuple(part.numpy() for part in view_statistics(padded, padded.amax(1) > 0))


def off_diagonal(overlap: np.ndarray) -> float:
    return float(overlap[~np.eye(len(overlap), dtype=bool)].mean())


entropy, overlap = {}, {}
for kind, found in (("image", on_image), ("text", on_text)):
    entropy[kind], overlap[kind] = statistics(found)
    assert np.allclose(np.diag(overlap[kind]), 1, atol=1e-3)
    assert np.allclose(overlap[kind], overlap[kind].T, atol=1e-5)

ticks = [str(k + 1) if v <= 16 or k % 4 == 0 else "" for k in range(v)]
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for ax, kind in zip(axes, overlap, strict=True):
    draw.matrix(ax, overlap[kind], ticks, label="overlap of two views")
    ax.set_title(f"{kind}: mean off the diagonal {off_diagonal(overlap[kind]):.2f}, "
                 f"mean entropy {entropy[kind].mean():.2f}")  # fmt: skip
    ax.set(xlabel="view", ylabel="view")
keep(figure, 2)

# %% [markdown]
# ## Is view k of the text about the same thing as view k of the picture?
#
# The paper shows one example: "View-4 of the text concentrates on the phrase 'holding onto,' while View-4 of
# the image focuses on the area associated with 'holding a rope.'" An example can be found in any set of
# sixteen maps. Phrases with boxes allow a count:
#
# 1. *One phrase, which view?* Take the text view with the most weight on the phrase's words and the image
#    view with the most weight inside its box. How often are they the same view? By chance 1 in v. But a view
#    that often wins on both sides agrees for that alone, so the phrases of one side are also shuffled: that
#    keeps how often each view wins and destroys what belongs together.
# 2. *One view, which phrase?* In a caption of several phrases each view has a share of its weight on each.
#    How much of the shares of image view j and text view k coincide? If the views correspond one to one, the
#    diagonal of that matrix stands out.
#
# The model has never seen a link between a phrase and a box.

# %%
metrics, tested = {}, None
try:
    linked = load(f"{of_run['dataset']}_entities", data.data_root, data.reported)
except DataError as error:
    linked = []
    print(f"Not measured: this dataset has no phrases linked to boxes here ({error.problem}).")

of_record = {record.image_id: number for number, record in enumerate(split.records)}
first_caption = np.searchsorted(split.image_of, np.arange(len(split.records)))
assert (np.diff(split.image_of) >= 0).all()
weight, caption_of = {"image": [], "text": []}, []
for record in linked:
    i = of_record.get(record.image_id)
    if i is None:
        continue
    assert record.captions == split.records[i].captions
    frame = torch.tensor([*record.size, *record.size], dtype=torch.float32)
    for phrase in record.phrases:
        c = int(first_caption[i]) + phrase.caption
        here = on_span(pieces(split.captions[c], tokenizer).offsets, phrase.start, phrase.end)
        if not phrase.boxes or not here.any():
            continue
        share = inside(where[i], torch.tensor(phrase.boxes) / frame)
        weight["image"].append(on_image[i][:, extra:] @ share)
        weight["text"].append(on_text[c][:, here].sum(1))
        caption_of.append(c)

if caption_of:
    images, texts = (torch.stack(weight[kind]) for kind in ("image", "text"))
    shuffles = 200 if p.smoke else 5000
    tested = correspondence(images, texts, torch.tensor(caption_of), shuffles=shuffles, seed=p.seed)
    metrics |= {key: value for key, value in tested.items() if key not in ("matrix", "winners")}
    assert 0 <= tested["agreement"] <= 1
    assert np.allclose(tested["winners"].sum(1), 1)
    more = tested["agreement_p"] < 0.05
    print(f"Same view for {tested['agreement']:.1%} of {tested['phrases']} phrases; 1 in {v} is {1 / v:.1%}, "
          f"shuffled pairs give {tested['agreement_shuffled']:.1%} (97.5th percentile "
          f"{tested['agreement_shuffled_high']:.1%}, p = {tested['agreement_p']:.4f}): "
          f"{'more than chance' if more else 'no more than chance'}.")  # fmt: skip
    stands_out = tested["diagonal_p"] < 0.05
    print(f"Coinciding shares: view k with view k {tested['diagonal']:.3f}, "
          f"with another {tested['off_diagonal']:.3f} "
          f"(p = {tested['diagonal_p']:.4f}, {tested['captions']} captions): "
          f"the diagonal {'stands out' if stands_out else 'does not stand out'}.")  # fmt: skip
    verdict = ("neither test finds it", "one of two tests finds it", "both tests find it")[more + stands_out]
    print(f"One-to-one mapping of views, in this run: {verdict}. One to one would mean 100 %.")

# %%
if tested:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4), width_ratios=[1.15, 1], layout="constrained")
    low, high = float(tested["matrix"].min()), float(tested["matrix"].max())
    draw.matrix(left, tested["matrix"], ticks, low=low, high=max(high, low + 1e-6),
                label="share of weight on the same phrases")  # fmt: skip
    left.set(xlabel="view of the caption", ylabel="view of the picture")
    left.set_title(f"which phrases: same view {tested['diagonal']:.3f}, another {tested['off_diagonal']:.3f}")
    values = {"measured": tested["agreement"], "shuffled pairs\n(95 % of them)": tested["agreement_shuffled"],
              f"1 in {v}": 1 / v}  # fmt: skip
    spread = [np.nan, 100 * (tested["agreement_shuffled_high"] - tested["agreement_shuffled"]), np.nan]
    rates = [100 * rate for rate in values.values()]
    draw.bars(right, list(values), {"": rates}, errors={"": spread}, ylabel="phrases of one best view (%)")
    right.set_title(f"which view: {tested['phrases']} phrases")
    keep(figure, 3)

# %% [markdown]
# ## Figure 4: retrieved pictures
#
# Three captions, chosen by a rule and not by eye: the first of the split whose picture is ranked first, the
# first whose picture is at rank 2 to 5, and the first whose picture is not among the top 5. A solid frame
# with a tick is the caption's own picture, a dashed one with a cross is another. On `scenes` it is known of
# what else a caption is true; such a picture is marked "also true". No method can know that it is not the one
# that was meant.

# %%
scores = (text @ image.T).numpy()
own = scores[np.arange(len(scores)), split.image_of]
rank = (scores >= own[:, None]).sum(1)  # from 1; ties count against the model
assert abs(100 * (rank == 1).mean() - again["t2i_r1"]) < 0.5
classes = {"rank 1": rank == 1, "rank 2 to 5": (rank > 1) & (rank <= 5), "beyond the top 5": rank > 5}
chosen = {name: int(np.flatnonzero(hit)[0]) for name, hit in classes.items() if hit.any()}
for missing in classes.keys() - chosen.keys():
    print(f"No caption has its picture at {missing}.")

meanings = []
if of_run["dataset"].startswith("scenes"):
    truths = attributes(split.records[0].image.parents[1], data.reported)[: len(split.records)]
    meanings = [meaning for truth in truths for meaning in truth["captions"]]
    assert [meaning["text"] for meaning in meanings] == split.captions


def also(c: int):
    """The note under a picture for caption c: whether the caption is true of it too."""
    return lambda i: (
        "also true" if meanings and i != split.image_of[c] and solutions(truths[i], meanings[c]) else ""
    )


def strips(lines: dict[str, int], models: dict[str, np.ndarray]) -> plt.Figure:
    """Captions (title to number), one row for each model (name to scores "captions pictures")."""
    drawn = [(title, c, name) for title, c in lines.items() for name in models]
    figure, axes = plt.subplots(len(drawn), 7, figsize=(10.4, 1.75 * len(drawn)),
                                width_ratios=[1.8] + [1] * 6, squeeze=False)  # fmt: skip
    for line, (title, c, name) in zip(axes, drawn, strict=True):
        found = draw.retrieval_strip(line, split.captions[c], lambda i: split.records[i].open(),
                                     models[name][c], int(split.image_of[c]), note=also(c))  # fmt: skip
        assert found == (models[name][c] >= models[name][c, split.image_of[c]]).sum()
        whose = f"{name}, caption {c} ({title})" if name else f"caption {c}: {title}"
        line[0].set_title(whose, fontsize=7.5, color="#57606a")
    figure.subplots_adjust(wspace=0.12, hspace=0.35, left=0.01, right=0.99, top=0.93, bottom=0.07)
    return figure


strips(chosen, {"": scores})
keep(plt.gcf(), 4, pictures=True)
{kind: f"caption {c}, rank {rank[c]} of {len(split.records)}" for kind, c in chosen.items()}

# %% [markdown]
# The paper's Figure 4 has two models side by side, CLIP and MVAM-CLIP. With `beside`, a run of another pooling on the same data, the
# page draws them: the first caption that only this run gets right, the first that only the other gets right, and the first that both get
# wrong. How often each case occurs is printed, because three captions prove nothing.

# %%
if not p.beside:
    print("Skipped: `beside` is empty. Give the folder of a run of the same data with another `pooling`.")
else:
    theirs = open_run(p.beside)
    same = theirs.data.splits[theirs.data.reported]
    if same.captions != split.captions:
        raise ValueError(
            f"{p.beside} was measured on other captions than {p.run}: give a run of the same data"
        )
    images, texts = embed(theirs.model.cpu(), same)
    names = [f"{one.parameters['backbone']} + {one.parameters['pooling']}" for one in (run, theirs)]
    both = dict(zip(names, (scores, (texts @ images.T).numpy()), strict=True))
    if len(both) == 1:
        raise ValueError(f"{p.run} and {p.beside} have the same backbone and pooling: give another run")
    this, other = (
        (table >= table[np.arange(len(table)), split.image_of][:, None]).sum(1) == 1
        for table in both.values()
    )
    cases = {f"only {names[0]} is right": this & ~other, f"only {names[1]} is right": other & ~this,
             "both are wrong": ~this & ~other}  # fmt: skip
    for title, hit in cases.items():
        print(f"{title}: {hit.mean():.1%} of {len(hit):,} captions")
    metrics |= {
        "beside_only_this": float((this & ~other).mean()),
        "beside_only_other": float((other & ~this).mean()),
    }
    strips({title: int(np.flatnonzero(hit)[0]) for title, hit in cases.items() if hit.any()}, both)
    keep(plt.gcf(), 6, pictures=True)

# %% [markdown]
# ## With and without the diversity loss
#
# The loss exists to keep views apart. Whether it does is seen beside the same run without it: entropy of each
# view, and the overlap of two.

# %%
for kind in overlap:
    metrics[f"{kind}_entropy"] = float(entropy[kind].mean())
    metrics[f"{kind}_overlap"] = off_diagonal(overlap[kind])
if not p.compare:
    print("Skipped: `compare` is empty. This makes a run without diversity loss:\n"
          "  papermill notebooks/mvam/2_train.ipynb run.ipynb -p diversity none"
          " -p out papermill_runs/mvam_train_none\n"
          "and this compares: -p compare papermill_runs/mvam_train_none")  # fmt: skip
else:
    beside = reopen(p.compare)
    of_other, other = beside.parameters, beside.model.cpu()
    differ = {key for key in (*vars(MVAMConfig()), "dataset", "backbone", "text", "seed", "smoke")
              if of_other[key] != of_run[key]}  # fmt: skip
    if unexpected := differ - {"diversity", "diversity_weight", "diversity_power", "diversity_reduce"}:
        raise ValueError(
            f"{p.compare} differs from {p.run} in {sorted(unexpected)} too: two causes, one difference"
        )
    if not differ:
        raise ValueError(f"{p.compare} has the same diversity loss as {p.run}: there is nothing to compare")
    names = [
        "none" if one["diversity"] == "none" else f"{one['diversity']} ({one['diversity_weight']:g})"
        for one in (of_run, of_other)
    ]
    theirs = beside.data.splits[beside.data.reported]
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.2), width_ratios=[2.6, 1], layout="constrained")
    figure.suptitle("diversity loss (and its weight): " + " beside ".join(names))
    for line, kind in zip(axes, overlap, strict=True):
        source = theirs.images if kind == "image" else theirs.texts
        e, o = statistics(attend(getattr(other, f"encode_{kind}"), source))
        metrics |= {f"compare_{kind}_entropy": float(e.mean()), f"compare_{kind}_overlap": off_diagonal(o)}
        draw.bars(line[0], ticks, dict(zip(names, (np.sort(entropy[kind]), np.sort(e)), strict=True)),
                  ylabel="entropy (1: uniform)")  # fmt: skip
        line[0].set(title=f"{kind} views, sorted by entropy", ylim=(0, 1.05), xlabel="view, by its entropy")
        two = [[off_diagonal(overlap[kind])], [off_diagonal(o)]]
        draw.bars(line[1], [kind], dict(zip(names, two, strict=True)), ylabel="mean overlap of two views")
        line[1].set(title=f"{two[0][0]:.2f} and {two[1][0]:.2f}", ylim=(0, 1.05))
        line[1].get_legend().remove()
        print(f"{kind}: overlap {two[0][0]:.3f} with {names[0]}, {two[1][0]:.3f} with {names[1]}; "
              f"entropy {entropy[kind].mean():.3f} and {e.mean():.3f}")  # fmt: skip
    print(f"t2i R@1 {run.metrics['t2i_r1']:.1f} and {beside.metrics['t2i_r1']:.1f} %, one seed each; "
          "the grid mvam_diversity has several")  # fmt: skip
    keep(figure, 5)

# %%
metrics |= {"t2i_r1": again["t2i_r1"], "i2t_r1": again["i2t_r1"], "protocol": again["protocol"]}
write_metrics(root() / p.out, p.as_dict() | {"views": v}, metrics, seconds=time.monotonic() - started)
metrics

# %% [markdown]
# Previous: [mvam/3_ablations](3_ablations.ipynb) · Next: [hslm/1_lesson](../hslm/1_lesson.ipynb)
