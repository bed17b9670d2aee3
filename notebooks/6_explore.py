# %% [markdown]
# # Explore: your own image and sentence
#
# Choose a trained run, an image and a sentence, and see what the model does with them. This page makes no table: it is for questions of your own.
#
# | method | what you can move |
# |:--|:--|
# | MVAM | a view of the image beside a view of the sentence, the same or another; what each view adds to the score |
# | HSLM | a word: its regions, and the words that it is like before and after self-attention; the score taken apart |
# | FELGA | a keyword: the proposals that it wins; a proposal: the texts that fit it; the images that fit the sentence |
# | SLAN | the level of the boxes, the filter's T and threshold; the cells that move a box |
#
# **Cost** a few seconds to open a run; then a slider or a sentence usually takes less than half a second of one core, at most about a second (`benchmarks/explore.json`). Where a method
# has no finished run with weights, a small one is trained on a few hundred drawn images first, in about two minutes. **Expected** what you ask for: a run on
# `scenes` knows only drawn shapes and the words for them; for photos, train on photos first ([the data page](../docs/data.md)).

# %% tags=["parameters"]
method: str = "mvam"  # mvam, hslm, felga or slan; all: the four side by side
trained: str = ""  # folder of a run; empty: choose among the finished runs of the method
image: int = 0  # number of the first image in the run's set
sentence: str = ""  # first sentence; empty: the first caption of the image
dataset: str = ""  # not used here: a run brings its own
data_root: str = ""  # not used here either
scale: str = ""  # nor this
seed: int = 0  # of a small run that is trained here
out: str = "data/cache/explore"  # folder of such small runs
smoke: bool = False  # train in seconds; what you see means nothing

# %% jupyter={"source_hidden": true}
from finematch.config import parameters

p = parameters(globals(), method={"mvam", "hslm", "felga", "slan", "all"}, image=(0, 10**7), seed=(0, 2**31))

# %% [markdown]
# Type a sentence and press Enter. An image comes from the set by its number, from a file by its name (drop the file onto JupyterLab's file browser, then type
# the name), or from the upload button. All controls work with the keyboard: Tab goes to the next, arrow keys move a slider.

# %%
from finematch.widgets import explorer

page = explorer(p.trained or p.method, image=p.image, sentence=p.sentence, folder=p.out, seed=p.seed, smoke=p.smoke)
page

# %% [markdown]
# The same numbers without this page: `match(run, "photo.jpg", "a dog on grass")` in Python, and `python -m finematch look mvam --image photo.jpg --text "a dog on
# grass" --out look.png` in a terminal. `page.panels[0].found` holds all that is drawn of the first run:

# %%
for panel in page.panels:
    found = panel.found
    print(f"{panel.method}: score {found.score:.3f} for {found.sentence!r}, tokens {found.tokens}")

# %% [markdown]
# Try:
#
# * **Change one word**, such as a colour. Does the score fall? Which view, word or box changes, and which stays?
# * **Say something false.** Which part of the score notices?
# * **Name two things, then one.** Do SLAN's boxes follow? Which of FELGA's proposals does the other keyword lose?
#
# Previous: [slan/9_video](slan/9_video.ipynb) · Next: [arena/2_train](arena/2_train.ipynb)
