"""Retrieval metrics against matrices worked by hand and against a brute-force ranking."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from finematch.evaluation.retrieval import (
    PROTOCOLS,
    _count_true,
    karpathy_protocol,
    retrieval,
    retrieval_blocks,
    retrieval_from_scores,
)


def brute_force(scores, image_of):
    """Ranks by sorting, in the manner of VSE++: position of the first hit in the descending list."""
    scores, image_of = np.asarray(scores, dtype=np.float64), np.asarray(image_of)
    assert len(np.unique(scores)) == scores.size, "the reference has no tie policy"
    i2t = [int(np.flatnonzero(image_of[np.argsort(-row)] == i)[0]) for i, row in enumerate(scores)]
    t2i = [int(np.flatnonzero(np.argsort(-column) == image_of[j])[0]) for j, column in enumerate(scores.T)]
    result = {}
    for name, rank in (("i2t", np.array(i2t)), ("t2i", np.array(t2i))):
        result |= {f"{name}_r{k}": 100 * np.mean(rank < k) for k in (1, 5, 10)}
        result |= {f"{name}_medr": np.floor(np.median(rank)) + 1, f"{name}_meanr": rank.mean() + 1}
    result["rsum"] = sum(result[f"{n}_r{k}"] for n in ("i2t", "t2i") for k in (1, 5, 10))
    return result


def tie_free(b, c, seed=0):
    """Distinct scores, in random places."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(b * c, generator=generator).reshape(b, c).float()


def planted(b, per_image, seed=0, d=32):
    """Embeddings whose captions lie near their image, so that recall is neither 0 nor 100."""
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(b, d, generator=generator), dim=1)
    image_of = torch.arange(b).repeat_interleave(per_image)
    noise = torch.randn(len(image_of), d, generator=generator)
    return image, F.normalize(image[image_of] + 0.5 * noise, dim=1), image_of


def check_equal(result, expected):
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-9), name


def test_matrix_worked_by_hand():
    # two images, two captions each; captions 0 1 belong to image 0, captions 2 3 to image 1
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.8, 0.7, 0.6, 0.3]])
    result = retrieval_from_scores(scores, [0, 0, 1, 1])
    # image 0: best own 0.9, nothing above, rank 0. Image 1: best own 0.6, captions 0 and 1 above, rank 2.
    assert result["i2t_r1"] == 50
    assert result["i2t_r5"] == 100
    # captions: 0 (0.9 > 0.8) rank 0; 1 (0.1 < 0.7) rank 1; 2 (0.6 > 0.5) rank 0; 3 (0.3 > 0.2) rank 0
    assert result["t2i_r1"] == 75
    assert result["i2t_meanr"] == 2  # (0 + 2) / 2 + 1
    assert result["i2t_medr"] == 2  # floor(median(0, 2)) + 1
    assert result["t2i_medr"] == 1
    assert result["t2i_meanr"] == 1.25
    assert result["rsum"] == 50 + 100 + 100 + 75 + 100 + 100
    assert (result["ties_i2t"], result["ties_t2i"]) == (0, 0)
    assert (result["images"], result["captions"]) == (2, 4)


def test_median_rank_of_an_even_number_is_rounded_down():
    # ranks of the images: 0 and 1, median 0.5, floor 0, plus 1
    scores = torch.tensor([[5.0, 1.0, 2.0], [6.0, 4.0, 3.0]])
    result = retrieval_from_scores(scores, [0, 1, 1])
    assert result["i2t_medr"] == 1
    assert result["i2t_meanr"] == 1.5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("b", "block"), [(7, 3), (23, 4), (40, 40), (61, 500), (13, 1)])
def test_equals_a_brute_force_ranking(b, block, seed):
    image_of = np.arange(b).repeat(5)
    scores = tie_free(b, 5 * b, seed)
    scores[image_of, np.arange(5 * b)] += 3 * b * b + 0.5  # lift the true pairs: some hits, no new ties
    result = retrieval_from_scores(scores, image_of, block=block)
    check_equal(result, brute_force(scores, image_of))
    assert result["i2t_r1"] > 0
    assert result["t2i_r1"] < 100
    assert result["ties_i2t"] == result["ties_t2i"] == 0


def test_variable_captions_in_any_order_equal_a_brute_force_ranking():
    rng = np.random.default_rng(0)
    image_of = rng.permutation(np.repeat(np.arange(19), rng.integers(1, 8, 19)))
    scores = tie_free(19, len(image_of))
    for block in (1, 4, 19):
        check_equal(retrieval_from_scores(scores, image_of, block=block), brute_force(scores, image_of))


@pytest.mark.parametrize("block", [2, 7, 16, 30, 83, 500])
def test_embeddings_equal_the_matrix_of_their_scores(block):
    image, text, image_of = planted(83, 5)
    expected = retrieval_from_scores(image @ text.T, image_of)
    assert 10 < expected["t2i_r1"] < 90
    assert retrieval(image, text, image_of, block=block) == expected


def test_order_of_images_and_captions_is_irrelevant():
    image, text, image_of = planted(50, 5)
    expected = retrieval(image, text, image_of)
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.randperm(50, generator=generator), torch.randperm(250, generator=generator)
    moved = torch.argsort(rows)[image_of][columns]  # where each caption's image went
    assert retrieval(image[rows], text[columns], moved, block=16) == expected
    assert retrieval_from_scores((image @ text.T)[rows][:, columns], moved, block=16) == expected


def test_pairwise_scorer_sees_every_pair_once_and_agrees():
    image, text, image_of = planted(33, 3)
    shuffled = torch.randperm(len(image_of), generator=torch.Generator().manual_seed(0))
    text, image_of = text[shuffled], image_of[shuffled]
    seen = torch.zeros(33, 99, dtype=torch.long)

    def score_block(images, captions):
        seen[images[:, None], captions] += 1
        return (image[images, None] * text[None, captions]).sum(-1)

    result = retrieval_blocks(score_block, 33, 99, image_of, block=10)
    check_equal(result, brute_force((image[:, None] * text).sum(-1), image_of))
    assert (seen == 1).all()
    with pytest.raises(ValueError, match="returned shape"):
        retrieval_blocks(lambda i, j: torch.zeros(len(j), len(i)), 33, 99, image_of)


def test_constant_scores_are_worth_nothing():
    result = retrieval_from_scores(torch.ones(20, 100), np.arange(20).repeat(5), block=6)
    assert [result[f"{n}_r{k}"] for n in ("i2t", "t2i") for k in (1, 5, 10)] == [0] * 6
    assert result["ties_i2t"] == 20
    assert result["ties_t2i"] == 100
    assert result["i2t_meanr"] == 96  # 95 captions of other images tie
    assert result["t2i_meanr"] == 20


@pytest.mark.parametrize(("block", "threads"), [(1, 1), (5, 1), (20, 1), (20, 2), (100, 1), (100, 2)])
def test_equal_embeddings_tie_in_every_tile(block, threads):
    # Found by measurement: 1024-d products of different shapes differ in the last bit, also between threads.
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(1, 1024, generator=generator), torch.randn(1, 1024, generator=generator)
    try:
        torch.set_num_threads(threads)
        result = retrieval(image.repeat(41, 1), text.repeat(123, 1), np.arange(41).repeat(3), block=block)
    finally:
        torch.set_num_threads(before)
    assert result["t2i_meanr"] == 41
    assert result["i2t_meanr"] == 121
    assert (result["ties_i2t"], result["ties_t2i"]) == (41, 123)


def test_a_duplicate_image_is_a_tie_against():
    image, text, image_of = planted(30, 2)
    text = image[image_of]  # perfect captions
    assert retrieval(image, text, image_of)["rsum"] == 600
    image = torch.cat([image, image[3:4]])  # a second copy of image 3, with a caption of its own
    text, image_of = torch.cat([text, -image[3:4]]), torch.cat([image_of, torch.tensor([30])])
    result = retrieval(image, text, image_of, block=8)
    assert result["ties_t2i"] == 3  # the two captions of image 3, and the copy's own
    assert result["t2i_r1"] == pytest.approx(100 * 58 / 61)
    assert result["ties_i2t"] == 0


def test_a_caption_that_two_images_share_is_a_tie_against():
    image, _, image_of = planted(30, 1)
    text = image.clone()
    text[20] = text[4]  # image 20 is captioned as image 4 is
    result = retrieval(image, text, image_of, block=7)
    assert result["ties_i2t"] == 2  # image 4 meets caption 20, image 20 meets caption 4, at the same score
    assert result["ties_t2i"] == 0
    assert result["i2t_r1"] <= 100 * 28 / 30


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_scores_raise(value):
    image_of = np.arange(12).repeat(5)
    scores = torch.rand(12, 60)
    scores[image_of, np.arange(60)] = value  # on the true pairs only: a sort would call this 100 %
    with pytest.raises(ValueError, match=r"image 0 and caption 0 .*must be finite"):
        retrieval_from_scores(scores, image_of, block=5)
    scores = torch.rand(12, 60)
    scores[11, 3] = value
    with pytest.raises(ValueError, match="image 11 and caption 3 "):
        retrieval_from_scores(scores, image_of, block=5)


def test_non_finite_embeddings_and_overflowing_scores_raise():
    image, text, image_of = planted(12, 2)
    text[17, 0] = float("nan")
    with pytest.raises(ValueError, match="text embedding 17 is not finite"):
        retrieval(image, text, image_of)
    with pytest.raises(ValueError, match="must be finite"):
        retrieval(image * 1e30, image[image_of] * 1e30, image_of)


def test_large_finite_scores_are_accepted():
    scores = torch.full((4, 4), 3e38) - torch.eye(4) * 6e37  # their sum overflows, no score does
    assert retrieval_from_scores(scores, range(4))["t2i_meanr"] == 4


def test_five_folds_are_the_mean_of_five_contiguous_parts():
    image, text, image_of = planted(60, 5, seed=2)
    result = retrieval(image, text, image_of, folds=5, block=5)
    parts = [
        retrieval(image[k : k + 12], text[5 * k : 5 * (k + 12)], image_of[: 5 * 12]) for k in range(0, 60, 12)
    ]
    for name in parts[0]:
        if name.startswith(("i2t_", "t2i_", "rsum")):
            assert result[name] == pytest.approx(np.mean([part[name] for part in parts])), name
    assert len({part["t2i_r1"] for part in parts}) > 1
    assert result["rsum"] > retrieval(image, text, image_of)["rsum"]
    assert (result["images"], result["captions"]) == (60, 300)
    assert "5 contiguous folds of 12 images" in result["protocol"]
    with pytest.raises(ValueError, match="7 folds do not divide 60 images"):
        retrieval(image, text, image_of, folds=7)


def test_ties_are_summed_over_folds():
    result = retrieval_from_scores(torch.zeros(10, 20), np.arange(10).repeat(2), folds=5)
    assert (result["ties_i2t"], result["ties_t2i"]) == (10, 20)


def test_protocol_string_and_names():
    result = retrieval_from_scores(tie_free(5, 25), np.arange(5).repeat(5), split="scenes test")
    assert result["protocol"] == (
        "scenes test: 5 images x 25 captions, image-to-text counts any of the picture's captions, "
        "ties against the model, 1 fold"
    )
    assert karpathy_protocol("coco1k", 5000) == {"split": "coco1k test", "folds": 5}
    assert karpathy_protocol("coco5k", 5000)["folds"] == karpathy_protocol("flickr1k", 1000)["folds"] == 1
    with pytest.raises(ValueError, match="5000 test images, not on 1000"):
        karpathy_protocol("coco1k", 1000)
    with pytest.raises(ValueError, match="unknown protocol 'coco'"):
        karpathy_protocol("coco", 5000)
    assert set(PROTOCOLS) == {"coco1k", "coco5k", "flickr1k"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_scored_in_float32(dtype):
    image, text, image_of = planted(60, 5)
    image, text = image.to(dtype), text.to(dtype)
    expected = retrieval(image.float(), text.float(), image_of)
    assert retrieval(image, text, image_of) == expected
    assert expected["ties_t2i"] == 0
    in_half = retrieval_from_scores((image @ text.T).bfloat16(), image_of)
    assert in_half["ties_t2i"] > 0  # what scoring in bf16 would have done


def test_training_precision_settings_do_not_leak_in():
    image, text, image_of = planted(60, 5, d=256)
    expected = retrieval(image, text, image_of)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert retrieval(image, text, image_of) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_inputs_are_left_alone_and_need_no_gradient():
    image, text, image_of = planted(20, 2)
    image.requires_grad_()
    scores = (image @ text.T).detach()
    kept = scores.clone()
    retrieval(image, text, image_of, block=3)
    retrieval_from_scores(scores, image_of, block=3)
    assert torch.equal(scores, kept)


@pytest.mark.parametrize(
    ("image_of", "message"),
    [
        ([0, 0, 1, 1, 1, 1], "image 2 has no caption"),
        ([0, 0, 1, 1, 3, 2], "caption 4 belongs to image 3, but the images are 0 to 2"),
        ([0, -1, 1, 1, 2, 2], "caption 1 belongs to image -1"),
        ([0, 0, 1, 1, 2], "5 captions, but there are 6"),
        (np.array([0.0, 0.0, 1.0, 1.0, 2.0, 2.0]), "one integer per caption"),
    ],
)
def test_bad_pairing_raises(image_of, message):
    with pytest.raises(ValueError, match=message):
        retrieval_from_scores(torch.rand(3, 6), image_of)


def test_bad_block_and_empty_gallery_raise():
    with pytest.raises(ValueError, match="at least 1"):
        retrieval_from_scores(torch.rand(3, 3), range(3), block=0)
    with pytest.raises(ValueError, match="no images"):
        retrieval_from_scores(torch.rand(0, 0), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("shape", [(1, 8), (255, 2040), (256, 2048), (700, 4104)])
def test_packed_count_equals_the_plain_sum(shape):
    for hits in (torch.rand(shape) < 0.7, torch.ones(shape, dtype=torch.bool)):
        for dim in (0, 1):
            assert torch.equal(_count_true(hits, dim), hits.sum(dim))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_is_bounded_by_the_tile():
    # 2,000 x 20,000 scores would be 160 MB, a copy of the captions 20 MB; a tile of 50 images is 0.1 MB.
    code = (
        "import re, torch\n"
        "from finematch.evaluation.retrieval import retrieval\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "torch.set_num_threads(1)\n"
        "image, text = torch.randn(2000, 256), torch.randn(20000, 256)\n"
        "owner = torch.arange(2000).repeat_interleave(10)\n"
        "retrieval(image[:200], text[:2000], owner[:2000], block=50)\n"
        "before = peak()\n"
        "retrieval(image, text, owner, block=BLOCK)\n"
        "print(peak() - before)\n"
    )
    growth = {}
    for block in (50, 2000):
        command = [sys.executable, "-c", code.replace("BLOCK", str(block))]
        growth[block] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert growth[50] < 10_000  # KB
    assert growth[2000] > 160_000  # one tile of everything: the measurement does see the matrix
