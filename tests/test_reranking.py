"""Re-ranking against a naive loop over lists, hand-worked cases, ties at every place, and a real matching head."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finematch.evaluation import reranking
from finematch.evaluation.reranking import reranked_retrieval, reranked_video_retrieval
from finematch.evaluation.retrieval import retrieval, retrieval_from_scores, video_retrieval

NAMES = [f"{way}_{m}" for way in ("i2t", "t2i") for m in ("r1", "r5", "r10", "medr", "meanr")] + ["rsum"]


def exact(n, d, seed, levels=3):
    """Embeddings of small whole numbers: their dot products are exact in any order, and tie often."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-levels, levels + 1, (n, d), generator=g).float()


def lookup(table, seen=None):
    def score_pairs(i, j):
        assert (i[1:] >= i[:-1]).all()  # picture by picture
        if seen is not None:
            seen.append((i.tolist(), j.tolist()))
        return table[i, j]

    return score_pairs


def naive(itc, head, image_of, k, *, score="itm"):
    """Lists, sorted: the best k by ITC (wrong ones first among equals), re-ranked; then the rest."""
    images = np.arange(len(itc))
    rows = {
        "i2t": [(itc[i], head[i], image_of, i) for i in images],
        "t2i": [(itc[:, j], head[:, j], images, image_of[j]) for j in range(len(image_of))],
    }
    out = {}
    for way, queries in rows.items():
        ranks, ties = [], 0
        for near, match, image, right in queries:
            order = sorted(range(len(near)), key=lambda x: (-near[x], image[x] == right, image[x], x))
            key = [(0, value) for value in near]
            for x in order[:k]:
                key[x] = (1, match[x] + near[x] if score == "itm+itc" else match[x])
            best = max(key[x] for x in order if image[x] == right)
            wrong = [key[x] for x in order if image[x] != right]
            rank = sum(w >= best for w in wrong)
            edge = near[order[:k][-1]]
            lost = any(image[x] == right and key[x] == (0, edge) for x in order)
            ranks.append(rank)
            ties += bool(rank != sum(w > best for w in wrong) or lost)
        r = np.array(ranks)
        out |= {f"{way}_r{n}": 100 * float(np.mean(r < n)) for n in (1, 5, 10)} | {f"ties_{way}": ties}
        out |= {f"{way}_medr": float(np.floor(np.median(r)) + 1), f"{way}_meanr": float(r.mean() + 1)}
    return out


def check(result, expected):
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("k", [1, 2, 5, 11, 1000])
@pytest.mark.parametrize("score", ["itm", "itm+itc"])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_a_naive_loop(k, score, ties, monkeypatch):
    monkeypatch.setattr(reranking, "PAIRS", 17)
    monkeypatch.setattr(reranking, "BLOCK", 5)
    rng = np.random.default_rng(0)
    for seed in range(4):
        b = 12
        image_of = rng.permutation(np.repeat(np.arange(b), rng.integers(1, 5, b)))
        c = len(image_of)
        image, text = exact(b, 4, seed), exact(c, 4, seed + 50)
        g = torch.Generator().manual_seed(seed)
        head = torch.randint(0, 9, (b, c), generator=g).float() if ties else torch.randn(b, c, generator=g)
        head[torch.from_numpy(image_of), torch.arange(c)] += 1.5 if not ties else 2
        found = reranked_retrieval(image, text, image_of, lookup(head), k=k, score=score)
        # in single precision, as the library adds
        expected = naive((image @ text.T).numpy(), head.numpy(), image_of, k, score=score)
        check(found, expected)
        assert found["rsum"] == pytest.approx(
            sum(found[f"{w}_r{n}"] for w in ("i2t", "t2i") for n in (1, 5, 10))
        )
        assert found["ties_i2t"] > 0 or k >= c


def test_worked_by_hand():
    # two images, captions 0 1 of image 0, captions 2 3 of image 1
    image, text = torch.eye(2), torch.tensor([[0.9, 0.1], [0.2, 0.4], [0.8, 0.5], [0.3, 0.7]])
    head = torch.tensor([[1.0, 9.0, 2.0, 9.0], [5.0, 9.0, 4.0, 9.0]])
    found = reranked_retrieval(image, text, [0, 0, 1, 1], lookup(head), k=2)
    # image 0: ITC .9 .2 .8 .3, candidates 0 (head 1) and 2 (head 2): wrong first, rank 1
    # image 1: ITC .1 .4 .5 .7, candidates 3 (9) and 2 (4), both own: rank 0
    assert (found["i2t_r1"], found["i2t_meanr"], found["i2t_medr"]) == (50, 1.5, 1)
    # captions, k = both images: 0 (1 < 5) rank 1; 1 (9 = 9, tied) rank 1; 2 (4 > 2) rank 0; 3 (9 = 9, tied) rank 1
    assert (found["t2i_r1"], found["t2i_meanr"], found["t2i_r5"]) == (25, 1.75, 100)
    assert (found["ties_i2t"], found["ties_t2i"]) == (0, 2)
    assert found["pairs"] == 8  # all captions of both images, each once
    assert "best 2 by ITC re-ranked by itm," in found["protocol"]
    # k = 1: image 0 has candidate 0 (own), rank 0; image 1 candidate 3, rank 0; captions: their best image by ITC,
    # 0 right, 1 wrong (.4 > .2), 2 wrong (.8 > .5), 3 right
    found = reranked_retrieval(image, text, [0, 0, 1, 1], lookup(head), k=1, score="itm+itc")
    assert (found["i2t_r1"], found["t2i_r1"]) == (100, 50)
    assert found["pairs"] == 4
    assert "re-ranked by itm+itc" in found["protocol"]


def planted(b, per_image, seed=0, d=32):
    g = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(b, d, generator=g), dim=1)
    image_of = torch.arange(b).repeat_interleave(per_image)
    text = F.normalize(image[image_of] + 0.5 * torch.randn(len(image_of), d, generator=g), dim=1)
    head = torch.randn(b, b * per_image, generator=g)
    head[image_of, torch.arange(b * per_image)] += 2.5
    return image, text, image_of, head


def test_the_whole_gallery_is_the_matching_head_alone():
    image, text, image_of, head = planted(43, 5)
    expected = retrieval_from_scores(head, image_of)
    for k in (215, 10_000):
        found = reranked_retrieval(image, text, image_of, lookup(head), k=k)
        check(found, {name: expected[name] for name in [*NAMES, "ties_i2t", "ties_t2i"]})
        assert found["pairs"] == 43 * 215
    both = retrieval_from_scores(head + image @ text.T, image_of)
    found = reranked_retrieval(image, text, image_of, lookup(head), k=215, score="itm+itc")
    check(found, {name: both[name] for name in NAMES})
    assert 10 < expected["t2i_r1"] < 90


def test_a_head_that_agrees_with_itc_changes_nothing():
    """The others keep ITC's order: with the same order above, mean ranks are ITC's to the last place."""
    image, text, image_of, _ = planted(60, 5)
    expected = retrieval(image, text, image_of)
    for k in (1, 7, 40):
        found = reranked_retrieval(image, text, image_of, lookup(7 * (image @ text.T) - 3), k=k)
        check(found, {name: expected[name] for name in NAMES})
    assert expected["t2i_meanr"] > 2


def test_blocks_and_order_change_nothing(monkeypatch):
    image, text, image_of, head = planted(31, 4)
    expected = reranked_retrieval(image, text, image_of, lookup(head), k=6)
    for block, pairs in ((1, 1), (4, 10), (31, 10_000), (7, 333)):
        seen = []
        monkeypatch.setattr(reranking, "PAIRS", pairs)
        monkeypatch.setattr(reranking, "BLOCK", block)
        assert reranked_retrieval(image, text, image_of, lookup(head, seen), k=6) == expected
        assert max(len(i) for i, _ in seen) <= pairs
        flat = [pair for i, j in seen for pair in zip(i, j, strict=True)]
        assert len(set(flat)) == len(flat) == expected["pairs"] < 31 * 124
    g = torch.Generator().manual_seed(1)
    rows, columns = torch.randperm(31, generator=g), torch.randperm(124, generator=g)
    moved = torch.argsort(rows)[image_of][columns]
    found = reranked_retrieval(image[rows], text[columns], moved, lookup(head[rows][:, columns]), k=6)
    assert found == expected


def test_equal_captions_tie_exactly(monkeypatch):
    """COCO has captions twice: their embeddings are equal, so are the scores, and the tie costs."""
    image, text, image_of, head = planted(40, 3, d=100)
    text, head = text.clone(), head.clone()
    for j in range(60):  # the last captions repeat the first, of other pictures
        text[119 - j], head[:, 119 - j] = text[j], head[:, j]
    for k in (1, 3, 9, 40, 120):
        for block in (1, 7, 40):
            monkeypatch.setattr(reranking, "BLOCK", block)
            found = reranked_retrieval(image, text, image_of, lookup(head), k=k)
            itc = (image.double() @ text.double().T).numpy()  # equal columns are equal here
            check(found, naive(itc, head.numpy(), image_of.numpy(), k))
    assert found["ties_i2t"] > 10


def test_a_tie_at_the_edge_counts_against_the_model():
    image, text = torch.eye(3), torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]])
    head = torch.zeros(3, 3)
    head[0, 0] = 5.0
    # image 0 sees captions 0 (own) and 1 at ITC 1: one place, the wrong one has it
    found = reranked_retrieval(image, text, [0, 1, 2], lookup(head), k=1)
    # image 0: rank 1. Image 1: all ITC 0, caption 0 takes the place, caption 2 ties below: rank 2. Image 2: rank 0.
    assert (found["i2t_r1"], found["i2t_meanr"]) == (pytest.approx(100 / 3), 2.0)
    assert found["ties_i2t"] == 2
    # caption 1 (of image 1): image 0 has the place; images 1 and 2 tie at 0: rank 2
    assert found["t2i_meanr"] == pytest.approx(5 / 3)
    assert found["ties_t2i"] == 1


def test_constant_scores_are_worth_nothing():
    found = reranked_retrieval(torch.ones(20, 4), torch.ones(100, 4), np.arange(20).repeat(5),
                               lookup(torch.ones(20, 100)), k=16)  # fmt: skip
    assert [found[f"{n}_r{k}"] for n in ("i2t", "t2i") for k in (1, 5, 10)] == [0] * 6
    assert (found["i2t_meanr"], found["t2i_meanr"]) == (96, 20)
    assert (found["ties_i2t"], found["ties_t2i"]) == (20, 100)


def test_folds_are_ranked_apart():
    image, text, image_of, head = planted(30, 2)
    seen = []
    found = reranked_retrieval(image, text, image_of, lookup(head, seen), k=4, folds=3, split="x")
    parts = [reranked_retrieval(image[s : s + 10], text[2 * s : 2 * s + 20], np.arange(10).repeat(2),
                                lookup(head[s : s + 10, 2 * s : 2 * s + 20]), k=4) for s in (0, 10, 20)]  # fmt: skip
    for name in NAMES:
        assert found[name] == pytest.approx(np.mean([p[name] for p in parts]))
    assert found["pairs"] == sum(p["pairs"] for p in parts)
    assert all(i // 10 == j // 20 for a, b in seen for i, j in zip(a, b, strict=True))
    assert found["protocol"].startswith("x: 30 images x 60 captions")
    assert found["protocol"].endswith("mean over 3 contiguous folds of 10 images")


def test_what_is_refused():
    image, text, image_of, head = planted(6, 2)
    ask = lookup(head)
    for options, said in [
        ({"score": "itc"}, "score is 'itc'"), ({"k": 0}, "k is at least 1, got 0"),
        ({"folds": 4}, "4 folds do not divide 6"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            reranked_retrieval(image, text, image_of, ask, **options)
    for value in (float("nan"), float("inf"), float("-inf")):
        wrong = head.clone()
        wrong[4, 7] = value
        with pytest.raises(ValueError, match=r"matching score of image 4 and caption 7 is -?(nan|inf)"):
            reranked_retrieval(image, text, image_of, lookup(wrong), k=12)
    wrong = text.clone()
    wrong[3, 0] = float("nan")
    with pytest.raises(ValueError, match="text embedding 3 is not finite"):
        reranked_retrieval(image, wrong, image_of, ask)
    with pytest.raises(ValueError, match="not finite: give unit vectors"):
        reranked_retrieval(image * 1e30, text * 1e30, image_of, ask)
    with pytest.raises(ValueError, match=r"returned shape \(2,\) for 72 pairs"):
        reranked_retrieval(image, text, image_of, lambda i, j: torch.zeros(2))
    with pytest.raises(ValueError, match="image 5 has no caption"):
        reranked_retrieval(image, text[:10], image_of[:10], ask)


def test_memory_is_that_of_a_block(monkeypatch):
    """Every product is a block of queries against the gallery, not the whole matrix."""
    image, text, image_of, head = planted(50, 4)
    largest, plain = [], torch.Tensor.__matmul__

    def watched(a, b):
        out = plain(a, b)
        largest.append(out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    monkeypatch.setattr(reranking, "BLOCK", 8)
    reranked_retrieval(image, text, image_of, lookup(head), k=5)
    assert len(largest) == 2 * (7 + 7)  # both directions, twice
    assert max(largest) <= 32 * 256


def test_equal_captions_tie_exactly_in_galleries_of_any_size():
    """A product's last columns may be added up in another order: then one of equal captions would win by a bit."""
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        b, extra, d = (
            int(torch.randint(low, high, (1,), generator=g)) for low, high in ((2, 60), (0, 200), (8, 600))
        )
        image_of = np.arange(b + extra) % b
        image = F.normalize(torch.randn(b, d, generator=g), dim=1)
        text = F.normalize(torch.randn(1, d, generator=g), dim=1).expand(b + extra, -1)
        found = reranked_retrieval(image, text, image_of, lambda i, j: torch.zeros(len(i)), k=1)
        wrong = b + extra - np.bincount(image_of)
        assert found["i2t_meanr"] == pytest.approx(
            wrong.mean() + 1
        )  # every caption ties: all wrong ones count
        assert found["ties_i2t"] == b


def test_videos_are_reranked_as_images_are():
    g = torch.Generator().manual_seed(5)
    video, text = exact(12, 4, 0), exact(18, 4, 1)
    video_of = np.sort(np.r_[np.arange(12), np.arange(6)])
    head = torch.randint(-3, 4, (12, 18), generator=g).float()
    itc = (video @ text.T).numpy()
    found = reranked_video_retrieval(
        video, text, video_of, lookup(head), k=5, split="x", frames="8 frames", skipped=2
    )
    expected = naive(itc, head.numpy(), video_of, 5)
    for old, new in (("i2t", "v2t"), ("t2i", "t2v")):
        for name in ("r1", "r5", "r10", "meanr"):
            assert found[f"{new}_{name}"] == pytest.approx(expected[f"{old}_{name}"])
        assert found[f"ties_{new}"] == expected[f"ties_{old}"]
    assert found["protocol"] == (
        "x: 12 videos x 18 captions, 8 frames, best 5 by ITC re-ranked by itm, the others below in ITC's order, "
        "2 missing or broken videos left out, ties against the model"
    )
    # the whole gallery: the matching head's own ranking, its median as it is
    whole = reranked_video_retrieval(video, text, video_of, lookup(head), k=18)
    alone = video_retrieval(head, video_of)
    assert {key: whole[key] for key in alone if key != "protocol"} == {
        key: alone[key] for key in alone if key != "protocol"
    }
    with pytest.raises(ValueError, match="k is at least 1"):
        reranked_video_retrieval(video, text, video_of, lookup(head), k=0)
