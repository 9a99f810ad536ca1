# SPDX-License-Identifier: Apache-2.0
"""How each metric is read: which way is better, what kind of value it is, its floor; and what a task says of itself.

Written down a second time: a table whose metric is turned around ranks the worst first, and says so nowhere.
"""

import pytest

from manyheads.tasks import load, names

# Of each task the metrics of which more is better, and those of which less is.
BETTER = {
    "attention_recall": ("recall", ""),
    "associative_recall": ("recalled", "tuning_nll training_nll"),
    "byte_lm": ("", "token_nll span_nll tuning_nll training_nll"),
    "classifier_cost": ("", "token_time kept products"),
    "channel_damage": ("answered kept grammatical new_token known_token", "swapped text_nll"),
    "codebook_use": ("codebook_perplexity", "key_error"),
    "denoised_prose": ("", "block_nll"),
    "denoised_sums": ("solved exact", "ms forwards read written training_nll"),
    "denoising_cost": ("", "seconds attention"),
    "family_counts": ("", "flops state"),
    "family_times": ("rank", "reading token crossover bias seconds"),
    "fidelity": ("psnr", "largest"),
    "kept_background": ("kept place object", ""),
    "latent_decoding": ("", "step"),
    "latent_schedules": ("agrees", "attention regret"),
    "massive_ablation": ("", "token_nll added_nll max_to_median largest_activation"),
    "memory": ("", "cache peak"),
    "mixer_cost": ("", "state decode"),
    "mixer_speed": ("", "token_time"),
    "object_detection": ("ap50 map rare_ap50 foreground_recall best_overlap", ""),
    "niah_multikey": ("multikey", ""),
    "niah_single": ("query_agnostic query_aware", ""),
    "offset_scores": ("score", ""),
    "pair_recall": ("recalled", ""),
    "perplexity": ("", "token_nll"),
    "pronoun_heads": ("shared_head odds_moved", "stereotyped"),
    "pronoun_tuning": ("grammatical", "pronoun_bias sentence_gap prefers_stereotype text_nll tuned"),
    "planted_constant": ("completed", "answer_nll"),
    "recall_in_text": ("recalled", "token_nll span_nll tuning_nll training_nll"),
    "sequence_classification": ("accuracy", "label_nll tuning_nll training_nll"),
    "encoder_cost": ("", "seconds"),
    "saliency": ("overlap correlation patches", ""),
    "scene_segmentation": ("iou", "training_loss"),
    "order_book": ("macro_f1 balanced_accuracy", "label_nll"),
    "sensor_windows": ("macro_f1 balanced_accuracy", "label_nll"),
    "scene_quality": ("likelihood object", "fd_small"),
    "speed": ("", "prefill decode"),
    "variable_tracking": ("tracked", ""),
}
SHARES = {
    "recalled", "grammatical", "new_token", "known_token", "place", "object", "agrees", "multikey", "query_agnostic",
    "query_aware", "definitions_found", "completed", "answered", "accuracy", "refused", "wrongly_refused", "copied",
    "answered_ok", "swapped", "rule_lifted", "tracked", "shared_pair", "dormant", "follows_waad", "recall",
    "shared_head", "stereotyped", "prefers_stereotype", "solved", "exact", "overlap", "iou", "foreground_recall",
    "best_overlap",
}  # fmt: skip
TIMES = {
    "decoding_cost.seconds": "s", "scoring_cost.seconds": "s/context", "detector_cost.seconds": "s/image",
    "denoising_cost.seconds": "s", "latent_decoding.step": "s", "latent_schedules.attention": "s", "speed.prefill": "s",
    "family_times.seconds": "s", "speed.decode": "ms", "mixer_cost.decode": "ms", "mixer_speed.token_time": "us/token",
    "encoder_speed.token_time": "us/token", "page_cost.token_time": "us/token",
    "classifier_cost.token_time": "us/token",
    "ranker_cost.document_time": "ms/document", "denoised_sums.ms": "ms", "shared_cache.step": "ms",
    "shared_sums.step": "ms", "shared_sums.seconds": "s", "inpainting.seconds": "s",
    "object_captions.token_seconds": "s", "voxel_edit_cost.seconds": "s", "encoder_cost.seconds": "s",
    "segmenter_cost.seconds": "s", "code_search.seconds": "s", "picture_cost.seconds": "s",
    "spatial_questions.seconds": "s", "converted_speed.prefill": "s", "converted_speed.decode": "ms",
    "context_attention.slowest": "ms", "context_attention.mean": "ms", "context_times.slowest": "ms",
    "context_times.mean": "ms", "expert_times.dispatch_time": "ms", "expert_times.block_time": "ms",
    "expert_times.sum_time": "ms", "prefill_time.prefill": "s", "scan_time.step_time": "ms",
    "two_dimensional.step_time": "s",
}  # fmt: skip
# What guessing reaches, or what the baseline has to exceed before an arm's loss of it means anything.
FLOORS = {
    "associative_recall.recalled": 0.5657, "recall_in_text.recalled": 0.5657, "channel_damage.answered": 0.5,
    "channel_damage.grammatical": 0.5,
    "niah_multikey.multikey": 0.5, "niah_single.query_agnostic": 0.5, "niah_single.query_aware": 0.5,
    "pronoun_tuning.grammatical": 0.5, "pair_recall.recalled": 0.5, "variable_tracking.tracked": 0.5,
    "scene_segmentation.iou": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("task", BETTER)
def test_which_way_is_better(task):
    more, less = (set(each.split()) for each in BETTER[task])
    found = {metric.name: metric.higher for metric in load(task).metrics}
    assert more | less <= set(found)
    assert all(found[name] for name in more) and not any(found[name] for name in less)


def test_kinds_units_and_floors():
    for task in names():
        for metric in load(task).metrics:
            name = f"{task}.{metric.name}"
            if task in BETTER:
                assert (metric.kind == "share") == (metric.name in SHARES), name
                assert metric.floor == pytest.approx(FLOORS.get(name), abs=1e-4), name
            assert (metric.kind == "time") == (name in TIMES) and metric.unit == TIMES.get(name, metric.unit), name
            tail = metric.title.rpartition(", ")[2]
            assert tail in (metric.title, metric.unit) or "/" not in tail, name  # a title with a unit has the metric's
            assert metric.kind != "time" or not metric.higher
            assert metric.kind != "share" or metric.unit == ""
            floor = metric.floor  # of a share or an area what guessing reaches; of an error what a constant has
            assert floor is None or 0 < floor < 1 or (metric.kind == "mean" and not metric.higher and floor == 1), name
            assert floor is None or metric.kind == "share" or not metric.higher or metric.name.endswith("auc"), name
            assert not metric.name.endswith(("_nll", "_loss")) or not metric.higher, name


def test_what_tasks_say_of_themselves():
    """Which time something and run alone, which need images of known contents, which report their training."""
    classes = {name: load(name) for name in names()}
    alone = {name for name, cls in classes.items() if cls.alone}
    assert alone >= {
        "speed",
        "memory",
        "mixer_cost",
        "mixer_speed",
        "decoding_cost",
        "denoising_cost",
        "latent_decoding",
        "latent_schedules",
    }
    assert not alone & (set(BETTER) - {name.split(".")[0] for name in TIMES} - {"memory"})
    known = {name for name, cls in classes.items() if getattr(cls, "known_contents", False)}
    assert known == {"inpainting", "kept_background", "scene_quality"}
    assert all(classes[name].reports for name in ("byte_lm", "associative_recall", "recall_in_text"))
    assert not classes["offset_scores"].reports and not classes["planted_constant"].reports
    kinds = {"diffusion": "pipeline", "training": "trainable", "kernels": "machine"}
    for field, kind in kinds.items():
        assert {cls.subject for name, cls in classes.items() if name in names(field)} == {kind}
