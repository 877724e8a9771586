"""Replace each image's placeholder in a token sequence by the image's visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


class Spliced(NamedTuple):
    """Input of the language model; L is the length of the longest spliced sequence of the batch.

    Attributes:
        inputs_embeds: [B, L, D], zeros at padding.
        attention_mask: [B, L] int64, 1 at tokens.
        position_ids: [B, L] int64, counted over tokens only (0 at padding).
        labels: [B, L] int64, `IGNORE_INDEX` at image tokens and padding.
        image_mask: [B, L] bool, True at visual tokens.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    image_mask: Tensor


def splice(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    image_features: Tensor | None,
    embed_tokens: Callable[[Tensor], Tensor],
    *,
    max_length: int | None = None,
    padding_side: str = "right",
) -> Spliced:
    """Replace every placeholder by the K visual tokens of its image, and pad again.

    All indices are computed by cumulative sums over the whole batch, without loops over samples or tokens.

    Args:
        input_ids: [B, T] token ids, `IMAGE_TOKEN_INDEX` for each image.
        attention_mask: [B, T], non-zero at tokens (padding may be on either side); None means all are tokens.
        labels: [B, T] or None (then the returned labels are all `IGNORE_INDEX`).
        image_features: [I, K, D] visual tokens in the order of `image_of_placeholder`; None without images.
        embed_tokens: token ids -> embeddings.
        max_length: cut each spliced sequence to this length, as v1 does; None does not cut.
        padding_side: ``right`` for training, ``left`` for generation.

    Raises:
        ValueError: the numbers of placeholders and images do not match, or there are no tokens.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}.")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be [batch, tokens] with at least one token, not {list(input_ids.shape)}.")
    device = input_ids.device
    is_token = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()  # [B, T]
    is_image = (input_ids == IMAGE_TOKEN_INDEX) & is_token  # [B, T]
    is_text = is_token & ~is_image  # [B, T]
    num_features = 0 if image_features is None else image_features.shape[0]
    chosen = image_of_placeholder(is_image, num_features)  # [P]
    tokens_per_image = 0 if image_features is None else image_features.shape[1]

    span = is_text.long() + is_image.long() * tokens_per_image  # [B, T] positions that each input token occupies
    end = span.cumsum(dim=1)  # [B, T]
    length = end[:, -1]  # [B]
    if max_length is not None:
        length = length.clamp(max=max_length)
    longest = int(length.max())
    start = end - span  # [B, T] the first of these positions, before padding
    row = torch.arange(input_ids.shape[0], device=device)[:, None].expand_as(input_ids)  # [B, T]

    text_row, text_column = row[is_text], start[is_text]  # [N] each
    steps = torch.arange(tokens_per_image, device=device)  # [K]
    image_row = row[is_image][:, None].expand(-1, tokens_per_image).reshape(-1)  # [P*K]
    image_column = (start[is_image][:, None] + steps).reshape(-1)  # [P*K]

    values = embed_tokens(input_ids[is_text])  # [N, D]
    if image_features is not None:
        # Unused images are not indexed but stay in the graph with a zero gradient, so that every rank runs the same
        # backward pass.
        visual = image_features.to(values.dtype).to(values.device)[chosen].flatten(0, 1)  # [P*K, D]
        # Gemma scales its embeddings. Up to transformers 4 (and so in v1's checkpoints) it scaled its whole input,
        # visual tokens included. Newer versions scale only the embedding table, so visual tokens are scaled here.
        scale = getattr(embed_tokens, "embed_scale", None)
        if scale is not None:
            visual = visual * torch.as_tensor(scale, dtype=values.dtype, device=values.device)
        values = torch.cat([values, visual])  # [N+P*K, D]
    rows, columns = torch.cat([text_row, image_row]), torch.cat([text_column, image_column])  # [N+P*K]
    from_image = torch.arange(len(rows), device=device) >= len(text_row)  # [N+P*K]
    token_labels = torch.full_like(rows, IGNORE_INDEX)  # [N+P*K]
    if labels is not None:
        token_labels[: len(text_row)] = labels[is_text]

    if max_length is not None:
        kept = columns < max_length
        rows, columns, values = rows[kept], columns[kept], values[kept]
        from_image, token_labels = from_image[kept], token_labels[kept]
    if padding_side == "left":
        columns = columns + (longest - length)[rows]

    shape = (input_ids.shape[0], longest)
    where = (rows, columns)
    inputs_embeds = values.new_zeros(*shape, values.shape[-1]).index_put(where, values)  # [B, L, D]
    new_mask = torch.zeros(shape, dtype=torch.long, device=device).index_put(where, torch.ones_like(rows))  # [B, L]
    new_labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long, device=device).index_put(where, token_labels)
    image_mask = torch.zeros(shape, dtype=torch.bool, device=device).index_put(where, from_image)  # [B, L]
    position_ids = (new_mask.cumsum(dim=1) - 1).clamp(min=0) * new_mask  # [B, L]
    return Spliced(inputs_embeds, new_mask, position_ids, new_labels, image_mask)


def image_of_placeholder(is_image: Tensor, num_features: int) -> Tensor:
    """Index of the image that belongs to each placeholder, in reading order.

    With P placeholders, T samples without any and I images:

    * I = P: images are in the order of the placeholders;
    * I = P + T: v1's convention, in which each text-only sample has a dummy image, which is skipped;
    * P = 0: every image is a dummy.

    Args:
        is_image: [B, T] bool.

    Returns:
        [P] int64.
    """
    per_sample = is_image.sum(dim=1)  # [B]
    num_placeholders, num_text_only = int(per_sample.sum()), int((per_sample == 0).sum())
    if num_features == num_placeholders or num_placeholders == 0:
        return torch.arange(num_placeholders, device=is_image.device)
    if num_features == num_placeholders + num_text_only:
        owned = per_sample.clamp(min=1)  # [B]
        first = owned.cumsum(dim=0) - owned  # [B] index of each sample's first image
        rank = is_image.cumsum(dim=1) - 1  # [B, T] number of earlier placeholders in the sample
        return (first[:, None] + rank)[is_image]
    raise ValueError(
        f"The batch has {num_placeholders} image placeholders and {num_text_only} samples without one, but "
        f"{num_features} images: pass one image per placeholder (or one more per text-only sample)."
    )
