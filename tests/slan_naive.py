"""SLAN's self-locator as the paper writes it: one picture, one text, one region, one cell at a time.

Written once, as the reference that the batched module must equal. Layers (convolutions, linear layers, norms) are the
module's own; everything that the paper's equations say is spelt out. Boxes are lists (x1, y1, x2, y2) in [0, 1].
"""

import math

import torch


def bilinear(plane, x, y):
    """A map "c h w" at (x, y) in cells: its value at centres, kept for half a cell beyond the border, then 0."""
    _, h, w = plane.shape
    if not (-0.5 <= x <= w + 0.5 and -0.5 <= y <= h + 0.5):
        return torch.zeros_like(plane[:, 0, 0])
    x, y = min(max(x - 0.5, 0), w - 1), min(max(y - 0.5, 0), h - 1)
    i, j = min(int(y), max(h - 2, 0)), min(int(x), max(w - 2, 0))
    below, right = min(i + 1, h - 1), min(j + 1, w - 1)
    v, u = y - i, x - j
    return (
        (1 - v) * (1 - u) * plane[:, i, j]
        + (1 - v) * u * plane[:, i, right]
        + v * (1 - u) * plane[:, below, j]
        + v * u * plane[:, below, right]
    )


def embedding(embed, plane, box):
    """Embedding(G, F): RoIAlign, mean, linear, norm."""
    _, h, w = plane.shape
    x1, y1, x2, y2 = box
    s = embed.samples
    total = 0
    for i in range(s):
        for j in range(s):
            x, y = x1 + (j + 0.5) / s * (x2 - x1), y1 + (i + 0.5) / s * (y2 - y1)
            total = total + bilinear(plane, float(x * w), float(y * h))
    return embed.norm(embed.project(total / s**2))


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def overlap(a, b):
    """IoU and GIoU of two boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    area = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / area, both / area - (hull - area) / hull


def cut(x, y, w, h, smallest):
    box = []
    for at, side in ((x, w), (y, h)):
        low = min(max(at - side / 2, 0), 1 - smallest)
        box.append((low, max(min(at + side / 2, 1), low + smallest)))
    return [box[0][0], box[1][0], box[0][1], box[1][1]]


def stopped(x, y, w, h, smallest):
    w, h = min(max(w, smallest), 1), min(max(h, smallest), 1)
    x, y = min(max(x, w / 2), 1 - w / 2), min(max(y, h / 2), 1 - h / 2)
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def proposals(rpn, planes):
    """(box, logit) of one picture, best first: every anchor of every map decoded, sorted, suppressed."""
    found = []
    for plane in planes:
        h, w = plane.shape[1:]
        hidden = rpn.head.conv(plane[None])
        logits, deltas = rpn.head.cls_logits(hidden)[0], rpn.head.bbox_pred(hidden)[0]
        for i in range(h):
            for j in range(w):
                for a, ratio in enumerate(rpn.ratios):
                    dx, dy, dw, dh = deltas[4 * a : 4 * a + 4, i, j].tolist()
                    width, height = rpn.anchor / math.sqrt(ratio) / w, rpn.anchor * math.sqrt(ratio) / h
                    x, y = (j + rpn.anchor_offset) / w + dx * width, (i + rpn.anchor_offset) / h + dy * height
                    box = cut(x, y, width * math.exp(dw), height * math.exp(dh), rpn.smallest)
                    found.append((box, float(logits[a, i, j])))
    found.sort(key=lambda pair: -pair[1])
    if not rpn.nms:
        return found[: rpn.count]
    kept = []
    for box, logit in found[: 10 * rpn.count]:
        if all(overlap(box, other)[0] <= rpn.nms for other, _ in kept):
            kept.append((box, logit))
    return kept[: rpn.count]


def filtered(part, found, regions=None, text=None):
    """3.2.2: numbers of the proposals that stay, best first, and their S."""
    logits = [logit for _, logit in found]
    if part.ask is not None:
        logits = [x + float(regions[i] @ part.ask(text)) / math.sqrt(len(text)) for i, x in enumerate(logits)]
    sigmoid = [1 / (1 + math.exp(-x)) for x in logits]
    if part.score_norm == "max":
        scores = [s / max(sigmoid) for s in sigmoid]
    elif part.score_norm == "minmax":
        low, high = min(logits), max(logits)
        scores = [(x - low) / (high - low) for x in logits]
    else:
        scores = sigmoid
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if part.top:
        order = order[: part.top]
    stay = [i for n, i in enumerate(order) if n == 0 or not part.threshold or scores[i] > part.threshold]
    return stay, [scores[i] for i in stay]


def attend_to(layer, x, memory):
    """A Transformer layer, head by head: `x` asks, `memory` answers."""
    attention, d = layer.attention, x.shape[1]
    wq, wk, wv = attention.in_proj_weight.chunk(3)
    bq, bk, bv = attention.in_proj_bias.chunk(3)
    q, k, v = x @ wq.T + bq, memory @ wk.T + bk, memory @ wv.T + bv
    size = d // attention.num_heads
    heads = []
    for n in range(attention.num_heads):
        at = slice(n * size, (n + 1) * size)
        rows = []
        for i in range(len(x)):
            logits = torch.stack([q[i, at] @ k[j, at] / math.sqrt(size) for j in range(len(memory))])
            rows.append(sum(p * v[j, at] for j, p in enumerate(logits.softmax(0))))
        heads.append(torch.stack(rows))
    x = layer.norm_attention(x + attention.out_proj(torch.cat(heads, 1)))
    return layer.norm_feed(x + layer.feed(x))


def cross_attention(layer, regions, words):
    """Eq. 1."""
    if layer.attn == "transformer":
        return attend_to(layer.regions, regions, words), attend_to(layer.words, words, regions)
    d = regions.shape[1]
    a = torch.tensor([[float(g @ t) / math.sqrt(d) for t in words] for g in regions], dtype=words.dtype)
    return (
        torch.stack([sum(p * t for p, t in zip(row.softmax(0), words, strict=True)) for row in a]),
        torch.stack([sum(p * g for p, g in zip(row.softmax(0), regions, strict=True)) for row in a.T]),
    )


def shift(match, inside, form, tau):
    """The weights of Eq. 2's cells; one that is outside the picture counts as the mean of those inside."""
    seen = [m for m, ok in zip(match, inside, strict=True) if ok]
    match = [m if ok else sum(seen) / len(seen) for m, ok in zip(match, inside, strict=True)]
    if form == "softmax":
        e = [math.exp(m / tau) for m in match]
        return [x / sum(e) for x in e]
    if form == "raw":
        return match
    positive = [max(m, 0.0) for m in match]
    return [m / max(sum(positive), 1e-6) for m in positive]


def level(adaptor, plane, boxes, regions, words, counted, scores, slots, unmet=None):
    """Lines 5 to 9 of Algorithm 1. `counted` lists the tokens that are words; `unmet` are E^T_1 where they steer."""
    attended, words = cross_attention(adaptor.attention, regions, words)
    asking = words if unmet is None else unmet
    k, new_boxes, new_regions = adaptor.k, [], []
    table = torch.zeros(len(boxes), len(words), dtype=words.dtype)
    for t, (x1, y1, x2, y2) in enumerate(boxes):
        x, y, w, h = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
        wide, high = (adaptor.ratio * (side if adaptor.extent == "region" else 1) for side in (w, h))
        match, inside = [], []
        for j in range(k * k):
            row, column = j // k - k // 2, j % k - k // 2
            cx, cy = x + column * wide / k, y + row * high / k
            cell = [cx - wide / k / 2, cy - high / k / 2, cx + wide / k / 2, cy + high / k / 2]
            e = embedding(adaptor.embed, plane, cell)
            match.append(max((cosine(e, asking[n]) for n in counted), default=0.0))
            inside.append(adaptor.outside == "keep" or (0 <= cx <= 1 and 0 <= cy <= 1))
        m = shift(match, inside, adaptor.weights, adaptor.tau)
        unit = 1 / k if adaptor.unit == "N/K" else 1
        by_row = [m[j] * (j // k - k // 2) * unit for j in range(k * k)]
        by_column = [m[j] * (j % k - k // 2) * unit for j in range(k * k)]
        if adaptor.axes == "image":
            dx, dy = sum(by_column) * wide, sum(by_row) * high
        else:  # as printed: the row with N^h moves x, the column with N^w moves y
            dx, dy = sum(by_row) * high, sum(by_column) * wide
        if adaptor.scaling == "predicted":
            p = adaptor.predict(attended[t]).exp().tolist()
        else:
            p = adaptor.theta[{"rank": t, "query": slots[t], "level": 0}[adaptor.scaling]].exp().tolist()
        box = stopped(x + dx, y + dy, p[0] * w, p[1] * h, adaptor.smallest)
        e = embedding(adaptor.embed, plane, box)
        for n in counted:
            table[t, n] = cosine(e, asking[n])
        if adaptor.region_update != "overwrite":
            e = scores[t] * e
        if adaptor.region_update == "residual":
            e = e + attended[t]
        new_boxes.append(box)
        new_regions.append(e)
    return new_boxes, torch.stack(new_regions), words, table


def regression(before, after, tables, counted, *, l1, giou, reduction, target, tau, part="box"):
    """Eq. 3. `after[i][t]` is region t after level i."""
    losses = []
    for t, g in enumerate(before):
        if target == "weighted":
            best = torch.tensor([max(float(m[t, n]) for n in counted) for m in tables], dtype=torch.float64)
            share = (best / tau).softmax(0).tolist()
        else:
            share = [1 / len(after)] * len(after)
        mean = [sum(p * level[t][c] for p, level in zip(share, after, strict=True)) for c in range(4)]

        def xywh(b):
            return (b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]

        if part == "centre":
            x, y, w, h = *xywh(mean)[:2], *xywh(g)[2:]
            mean = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        distance = sum(abs(p - q) for p, q in zip(xywh(g), xywh(mean), strict=True))
        losses.append(l1 * distance + giou * (1 - overlap(g, mean)[1]))
    return sum(losses) / (len(losses) if reduction == "mean" else 1)


def locate(model, planes, v, found, words, counted):
    """Algorithm 1 for one picture and one text without padding.

    Args:
        planes: F_i "c h w", coarse to fine.
        v: the encoder's last map.
        found: (box, logit) of each proposal.
        words: "n d".
        counted: numbers of the tokens that are words.
    """
    first = v if model.config.first == "encoder" else planes[0]
    every = [embedding(model.embed, first, box) for box, _ in found]
    stay, scores = filtered(model.filter, found, every, words[0])
    boxes, plain = [found[i][0] for i in stay], torch.stack([every[i] for i in stay])
    if not model.config.weighting:
        strength = [1.0] * len(stay)
    else:
        strength = scores
    regions = torch.stack([s * e for s, e in zip(strength, plain, strict=True)])
    table = torch.zeros(len(boxes), len(words), dtype=words.dtype)
    for t, e in enumerate(plain):
        for n in counted:
            table[t, n] = cosine(e, words[n])
    history, tables, unmet = [boxes], [table], words if model.config.steer == "unimodal" else None
    for adaptor, plane in zip(model.adaptors, planes, strict=False):
        boxes, regions, words, table = level(
            adaptor, plane, boxes, regions, words, counted, strength, stay, unmet
        )
        history.append(boxes)
        tables.append(table)
    loss = 0.0
    if len(model.adaptors):
        loss = regression(
            history[0], history[1:], tables[1:], counted, l1=model.config.l1_weight,
            giou=model.config.giou_weight, reduction=model.config.reg_reduction, target=model.config.target,
            tau=model.config.cell_tau, part=model.config.reg_part,
        )  # fmt: skip
    return {
        "boxes": torch.tensor(history, dtype=words.dtype),
        "scores": torch.tensor(scores, dtype=words.dtype),
        "regions": regions,
        "words": words,
        "picture": regions.mean(0) if model.config.fused == "regions" else model.whole(v.flatten(1).mean(1)),
        "text": words[0],
        "reg_loss": torch.tensor(loss, dtype=words.dtype),
        "cosine": torch.stack(tables),
    }
