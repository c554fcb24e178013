"""Examples, headings and order of flags in `clipgraft COMMAND --help`."""

from __future__ import annotations

EXAMPLES = {
    "train": "clipgraft train --model ViT-B-32 --pretrained laion2b_s34b_b79k --train-data photos.csv "
    "--val-data val.csv --use-lora --lora-r 16 --epochs 10",
    "eval": "clipgraft eval --model logs/NAME --val-data test.csv",
    "sweep": 'clipgraft sweep --train-data photos.csv --val-data val.csv --targets "text-attention;linear" '
    "--lora-r 4,16",
    "report": "clipgraft report logs/NAME logs/OTHER --out report.html",
    "encode": "clipgraft encode photos encoded --adapter logs/NAME",
    "index": "clipgraft index encoded --factory IVF256,Flat",
    "search": 'clipgraft search encoded "a red shoe" --k 5',
    "merge": "clipgraft merge logs/NAME merged --to transformers",
    "convert": "clipgraft convert adapter.pt adapter --to peft",
    "inspect": "clipgraft inspect ViT-B-32",
    "profile": "clipgraft profile ViT-B-32 --batch-size 8",
    "compact": "clipgraft compact emoji small --text-layers 2 --vision-layers 2",
    "demo": "clipgraft demo --out demo",
}

HEADINGS = {
    "ModelFlags": "model",
    "DeviceFlags": "machine",
    "ColumnArgs": "data",
    "TableArgs": "data",
    "TableFlags": "data",
    "DataFlags": "data",
    "CacheArgs": "machine",
    "PromptFlags": "classes",
    "ClassFlags": "classes",
    "ClassTrainFlags": "classes",
    "LoraFlags": "adapter",
    "SweepFlags": "grid and adapters",
    "TrainArgs": "training",
    "RunFlags": "output",
    "RunArgs": "output",
    "EvalFlags": "evaluation",
    "EncodeFlags": "encoding",
    "EncodeArgs": "encoding",
    "DistillFlags": "distillation",
}
ORDER = (
    "model",
    "data",
    "adapter",
    "grid and adapters",
    "training",
    "distillation",
    "evaluation",
    "encoding",
    "classes",
    "output",
    "machine",
    "rarely needed",
)
_OUTPUT = ("logs", "name", "html", "format", "overwrite")
_MACHINE = ("device", "precision", "workers", "feature_cache", "cache_gb")
_FIRST = ("use_lora", "lora_r", "lora_targets", "train_data", "val_data", "test_data")
_RARE = frozenset(
    (
        "beta1",
        "beta2",
        "cache_gb",
        "cache_views",
        "checkpoint_steps",
        "class_weights",
        "csv_separator",
        "dataset_type",
        "epoch_parts",
        "epochs_cooldown",
        "eps",
        "exact_preprocess",
        "force",
        "lock_image_unlocked_groups",
        "lock_text_unlocked_layers",
        "lora_alpha_pattern",
        "lora_bias",
        "lora_init",
        "lora_plus_ratio",
        "lora_rank_pattern",
        "lora_rslora",
        "lora_target_modules",
        "lora_train_logit_scale",
        "lora_variant_options",
        "lr_cooldown_end",
        "lr_cooldown_power",
        "max_bad_rows",
        "negatives",
        "peft_out_proj",
        "ray_address",
        "ray_gpus_per_worker",
        "ray_workers",
        "retry_errors",
        "save_lora_only",
        "shard_rows",
        "strict",
    )
)


def heading(spec: str, field: str, otherwise: str) -> str:
    """Choose the heading of a flag in a command's help."""
    if field in _RARE:
        return "rarely needed"
    if field in _MACHINE:
        return "machine"
    return "output" if field in _OUTPUT else HEADINGS.get(spec, otherwise)


def in_order(headings: list[str]) -> list[str]:
    """Sort the headings of a command: its own first, then the shared ones in the order of need."""
    return sorted(headings, key=lambda name: ORDER.index(name) if name in ORDER else -1)


def first(field: str) -> int:
    """Sort key of the flags of a heading: those that nearly every command line has come first."""
    return _FIRST.index(field) if field in _FIRST else len(_FIRST)
