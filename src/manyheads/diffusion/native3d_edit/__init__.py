# SPDX-License-Identifier: Apache-2.0
"""Editing by instruction: the source's clean tokens beside the noisy ones of the target, under full self-attention.

"Native 3D Editing with Full Attention". A generator of 3D objects (rectified flow over a grid of latents) is trained on
triplets of source, instruction and target. With N tokens of the noisy target x_t and M of the source s,

    X = [x_t; s]            one sequence of N + M tokens, through all blocks as they are
    v = head(X)[:N]         the velocity is read from the target's tokens alone

Both halves have the same positions, so that a token of the target finds the place it is about; there are no new weights
but, optionally, two vectors that name the halves, zero at first. The paper's rival is :mod:`.cross_attention`, in every
block an attention of the target's tokens to the source's with projections of its own, whose output begins at zero;
:mod:`.channels` is the usual third way, the source as further channels of the target.

    edit = conditioned(transformer, "native3d_edit")         # manyheads.integrations.source_condition
    velocity = edit(noisy, source, timestep, encoder_hidden_states=text)

works for diffusers' Wan (a grid of three axes, or images as one frame), PixArt and SD3 (two axes), none of which is
changed; train the two together. On voxels, with the instruction as text:

    python -m manyheads.recipes.native3d_edit --strategy native3d_edit --out FOLDER

What the paper's text does not say and was chosen here: source tokens are told time 0 (``time=clean``), which needs a
denoiser with a time for every token (Wan); the vectors of the halves; that attention to the source stands beside that
to the text, reads the same normalised tokens and rotates queries and keys by the denoiser's positions. The paper's
second stage (features of the occupied voxels), its generator's weights, data and captions are not here, nor is
guidance, for which instruction or source would be left out of a part of the training.
"""

from .channels import SourceChannels
from .cross_attention import SourceAttention
from .native3d_edit import ContextTokens

__all__ = ["ContextTokens", "SourceAttention", "SourceChannels"]
