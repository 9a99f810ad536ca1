# SPDX-License-Identifier: Apache-2.0
"""Video-P2P: a video or image is edited by its prompt; where words act stays as it was in the source.

Source and target are made side by side, in the same batch. The source is told its own prompt and comes out as it was;
the target is told another, and takes from the source

- *cross-attention maps* in the first steps: columns of words that both prompts have, or that take each other's place
  (``edit``, see :mod:`manyheads.diffusion._alignment`), times a factor for words that are to count more or less
  (``reweight``);
- *self-attention maps*, over time and within frames, in the first steps;
- *latents*, where none of the words that differ act (*local blend*): their maps, summed over steps and sites, largest
  of 3 x 3 neighbours, above a share of the frame's greatest, of source or target.

An inverted source comes out as it was under *decoupled guidance*: the target's unconditional rows are the prompt's "",
the source's are those of an embedding that is fitted at every step, one for all frames, so that the guided step leads
to where the inversion came from (``unguided``: the source is not guided at all, the released code's fast mode).

Video-P2P: Video Editing with Cross-attention Control (arXiv 2303.04761), after Prompt-to-Prompt (2208.01626) and
null-text inversion (2211.09794).

    with manyheads.use(pipe, "video_p2p"):  # a word swap, from the same noise
        pipe(["apple up frog", "ghost up frog"], latents=torch.cat([noise, noise]))

    path = pipe.path(video, steps, prompt="apple up frog")  # of one that was not made here: its inversion
    with manyheads.use(pipe, VideoP2P(path=path)):
        pipe(["apple up frog", "ghost up frog"], latents=torch.cat([path[0]] * 2), num_inference_steps=steps)

Maps are never made. With values V of the target's, ``(A_s M) V = A_s (M V)``: columns are carried over by mixing values
under the source's queries and keys, in fused attention.

Shapes: q, k, v ``[B, H, T, d]``; in every branch the first half of the rows are sources, the second their targets.

Choices. The paper first tunes an image model, inflated to frames, on the one clip; that is left out: a model of videos
takes its place. *Joint attention* (not in the paper) is taken apart for image queries: the share and distribution of
their attention over text are the cross-attention map, the distribution over image tokens is the self-attention map;
what text leaves is the image's. Text queries stay the target's own. ``self_maps=temporal`` is what the released code
does, whose hook misses attention within frames. In UNets, maps of a grid finer than ``map_size`` are left alone; other
denoisers have but one grid. Maps of the local blend are those before they are edited, at all such sites. Where both
prompts are the same and nothing is reweighted, no word differs: under the blend the target is the source, bit for bit
(without it, the two rows of an inverted source are guided apart). The blend is written into the target's predictions,
so that any sampler carries it: where the scheduler's steps are known (DDIM that does not clip, Euler of a flow) the
next latents are the source's at once, else they come to it by the last step.
"""

from .._inversion import path
from .video_p2p import VideoP2P

__all__ = ["VideoP2P", "path"]
