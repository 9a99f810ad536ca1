# SPDX-License-Identifier: Apache-2.0
"""Looking again at the image where a vision-language model decodes without it: a sensor, a gate and a shift.

While it writes, a model may go on from its text alone and name what is likely rather than what is there. Image ``V``
and text ``X`` are taken as players of a game. The value ``v_c(S)`` of players S for a candidate token c is its
log-probability where the columns of the others are hidden; what the two give together beyond what each gives is their
Harsanyi dividend

    I_c = v_c(VX) - v_c(V) - v_c(X) + v_c(0).

The sensor is its variance over the K likeliest candidates: where image and text would choose differently together than
each alone, candidates part. Above a threshold the step is read again, with the logits of image columns raised in the
middle layers: a head whose image mass m is below a target m* gets ``logit(m*) - logit(m)`` on each of them, which
makes the mass m* exactly and leaves text against text as it was.

Conscious Gaze: Adaptive Attention Mechanisms for Hallucination Mitigation in Vision-Language Models (CG-VLM).

Shapes: streams S = 4 (VX, V, X, 0), candidates K, heads H, columns ``[S]`` of prompt and text.

Differences. Only what the paper says of its method in general could be read, so formulas are ours: the value function,
the variance, the closed form of the shift, the consensus of heads (``shape``) as a shift too. Columns are hidden by a
mask, at unchanged positions, where the paper may replace the image. The token that is read at a step is in the residual
stream of all four readings. ``head`` and ``tail`` tokens of the prompt are in all of them too: the start of text, and
what a chat template ends with.
"""

from .conscious_gaze import ConsciousGaze, calibrated
from .interaction import dividends, sensed
from .steering import Steering, toward

__all__ = ["ConsciousGaze", "Steering", "calibrated", "dividends", "sensed", "toward"]
