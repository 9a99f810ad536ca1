# SPDX-License-Identifier: Apache-2.0
"""A video filmed again along another camera path: one query over the tokens of poses and of a rendering from there.

"PostCam: Camera-Controllable Novel-View Video Generation with Query-Shared Cross-Attention" (arXiv 2511.17185). A video
denoiser is shown the source as further frames, is told the cameras to film with, and is shown a rendering: the source
reprojected along the new path by an estimated depth, down-sampled four times, which keeps coarse motion and hides the
artefacts of the depth. In every block, beside attention to the text,

    h = h + W_0 W_o softmax([q k_pose^T ; q k_render^T] / sqrt(d)) [v_pose ; v_render],    q = R N(n W_q)
    k_pose = R_1 N(p W_k),  v_pose = p W_v,    k_render = R_s N(r W_k'),  v_render = r W_v'

one softmax over both streams, of one query: n are the target's tokens as attention to text reads them, p the encoded
poses, one token a frame, r the rendering's tokens, which pass through the same blocks apart (no attention to text) and
are taken where self-attention reads them. N is an RMS norm of all heads together, one for the keys of both; R, R_s the
denoiser's rotary positions, those of the rendering spread over the target's grid, R_1 the frame over all channels of a
head. W_0 is zero at first with its bias: the denoiser begins as it was, with the source as further frames. Training has
two stages, poses alone (no rendering is given), then both. Some 7 dim^2 weights a layer.

    film = conditioned(transformer, "postcam")               # manyheads.integrations.source_condition
    velocity = film(noisy, source, timestep, cameras, render, encoder_hidden_states=text)

works for diffusers' Wan, which is not changed; train it with the new weights (the paper: its self-attention alone).
:mod:`manyheads.data.cameras` makes paths and renderings. On small filmed scenes, from scratch:

    python -m manyheads.recipes.postcam --out FOLDER

The paper's text was not at hand but its abstract. The module is that of the released code, which samples and does not
train; what begins at zero, what trains and the stages are as notes of others have it. One thing of the code is not
followed: it spreads the rendering's positions by the ratio of one's width to the other's height, which leaves them in
the middle of a wide picture; here they are spread over all of it. The lengths of stages and the share of weights that
train are the caller's. :mod:`.pose_added` is the rival that adds poses to tokens. No released weights, depth estimator,
captions or text-to-video generator are here.
"""

from .pose_added import PoseAdded
from .postcam import PostCam

__all__ = ["PoseAdded", "PostCam"]
