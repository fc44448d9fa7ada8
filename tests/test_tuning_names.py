"""The options of training/finetune.py under the names of other programs, and those of transformers' Trainer."""

from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from moss_vl.training import finetune, tuning_options
from moss_vl.training.option_names import ALIASES, data_files
from moss_vl.training.requirements import check_optimizer, check_reporters
from moss_vl.training.trainer_arguments import COVERED, FIXED, REFUSED, passed_fields, training_arguments


BASE = ["--checkpoint", "c", "--data", "d", "--output", "o", "--cpu"]


def parse(*options):
    return finetune.parse([*BASE, *map(str, options)])


def error_of(capsys, *options):
    with pytest.raises(SystemExit) as error:
        finetune.parse(list(map(str, options)))
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_script_of_another_program_gives_the_same_run():
    theirs = (
        "--model_name_or_path c --data_path d --output_dir o --use_cpu True --lora_enable True --lora_rank 64 "
        "--lora_alpha 32 --lora_dropout 0.05 --model_max_length 4096 --num_train_epochs 2 --max_steps -1 "
        "--per_device_train_batch_size 4 --gradient_accumulation_steps=8 --learning_rate 2e-4 --lr_scheduler_type "
        "linear --warmup_ratio 0.1 --weight_decay 0.01 --max_grad_norm 0.5 --save_steps 7 --save_total_limit 1 "
        "--logging_steps 3 --dataloader_num_workers 5 --gradient_checkpointing True --bf16 False --report_to none "
        "--vision_tower_lr 1e-6 --mm_projector_lr 1e-5 --tune_mm_vision True --tune_mm_mlp True --tune_mm_llm False "
        "--max_pixels 9216 --do_train --remove_unused_columns False"
    )
    ours = (
        "--lora-rank 64 --lora-alpha 32 --lora-dropout 0.05 --max-length 4096 --epochs 2 --batch-size 4 "
        "--accumulation 8 --lr 2e-4 --schedule linear --warmup 0.1 --weight-decay 0.01 --max-grad-norm 0.5 "
        "--save-steps 7 --keep 1 --log-steps 3 --workers 5 --gradient-checkpointing --no-bf16 --lr-vision 1e-6 "
        "--lr-merger 1e-5 --train vision merger --max-pixels 9216"
    )
    found, expected = vars(finetune.parse(theirs.split())), vars(parse(*ours.split()))
    assert found.pop("trainer") == {"do_train": True, "remove_unused_columns": False} and not expected.pop("trainer")
    assert found == expected


def test_every_alias_sets_its_option():
    """With a value of the option's own, which differs from its default."""
    values = {"--eval-data": "x.json", "--schedule": "linear", "--attn": "eager", "--warmup": "0.5"}
    base = {"--checkpoint": "c", "--data": "d", "--output": "o", "--train": "vision", "--lora-rank": "3"}
    for option, names in ALIASES.items():
        for name in names:
            given = [word for key, value in base.items() if key != option for word in (key, value)]
            value = values.get(option, "7" if option not in ("--gradient-checkpointing", "--cpu") else "True")
            if option == "--lr-merger":
                given = [word if word != "vision" else "merger" for word in given]
            under_its_name, under_alias = (vars(finetune.parse([*given, each, value])) for each in (option, name))
            assert under_alias == under_its_name, name
            key = option[2:].replace("-", "_")
            needed = ["--checkpoint", "c", "--data", "d", "--output", "o", "--train", "vision", "merger"]
            assert option in base or under_alias[key] != vars(finetune.parse(needed))[key], name


def test_switches_take_true_and_false():
    for words, expected in (([], None), (["--bf16"], True), (["--bf16", "True"], True), (["--bf16=false"], False)):
        assert parse(*words).bf16 == bool(expected)
    assert parse("--no-template").template is False and parse("--template", "True").template is True
    assert parse("--skip_bad", "False").skip_bad is False and parse("--skip-bad").skip_bad is True
    assert parse("--max_steps", "-1").steps is None


@pytest.mark.parametrize(
    "options, reason",
    [
        ("--lr 1e-5 --learning_rate 2e-5", "--lr and --learning-rate name the same option, and disagree"),
        ("--data_path x", "--data and --data-path name the same option"),
        ("--bf16 --no-bf16", "--bf16 and --no-bf16"),
        ("--warmup_ratio 0.1 --warmup_steps 10", "--warmup-ratio and --warmup-steps"),
        ("--warmup_ratio 1.5", "must be at least 0 and below 1"),
        ("--lora_enable True", "--lora-enable True, and --lora-rank is 0"),
        ("--lora_enable False --lora_rank 8", "--lora-enable False, and --lora-rank is 8"),
        ("--tune_mm_llm False", "all are False"),
        ("--tune_mm_mlp True --train vision", "train merger, and --train says vision"),
        ("--cpu maybe", "expected True or False, got 'maybe'"),
        ("--lerning_rate 1", "unknown option --lerning-rate; did you mean --learning-rate?"),
        ("--adam_betta2 0.9", "did you mean --adam-beta2?"),
        ("--adam_beta2 high", "invalid float value: 'high'"),
        ("--seed 1 stray", "unknown option stray"),
        ("--lo 3", "unknown option --lo"),
        ("--device cpu", "unknown option --device; --help lists the options"),
        ("--remove_unused_columns True", "the inputs of the model would be removed"),
        ("--label_smoothing_factor 0.1", "logits before the first learned token are not computed"),
        ("--do_eval", "give --eval-data or --eval-share"),
        ("--hub_model_id me/x", "upload the output folder"),
        ('--accelerator_config {"dispatch_batches":true}', "dispatch_batches would split the packed patches"),
        ("--accelerator_config nowhere.json", "it is no JSON object and no file with one"),
        ("--eval_on_start", "--eval-on-start needs held-out records"),
        ("--eval-generate 3", "needs held-out records"),
        ('--gradient_checkpointing_kwargs {"use_reentrant":true}', "needs --gradient-checkpointing"),
        ("--fp16 --bf16", "give --fp16 or --bf16, not both"),
        ("--deepspeed x.json --fsdp", "give --deepspeed or --fsdp, not both"),
        ("--fsdp_config x.json", "--fsdp-config needs --fsdp"),
        ("--lr-vision 1", "--lr-vision has no effect: --train merger cross language leaves vision frozen"),
        ("--lora-also gates", "--lora-also is for adapters"),
    ],
)
def test_contradictions_and_unknown_names(options, reason, capsys):
    assert reason in error_of(capsys, *BASE, *options.split())


def test_names_that_agree_are_no_contradiction():
    assert parse("--lr", "1e-5", "--learning_rate", "0.00001").lr == 1e-5
    assert parse("--lr", "1", "--lr", "2").lr == 2, "the last one of the same name"
    assert parse("--tune_mm_mlp", "--train", "merger").train == ["merger"]
    assert parse("--lora-rank", 2, "--train", "vision", "--lora-also", "gates", "--lr-cross", 1).lr_cross == 1


def test_every_field_of_the_trainer_has_one_place():
    names = {field.name for field in fields(TrainingArguments) if field.init and not field.name.startswith("_")}
    places = [set(COVERED) & names, set(FIXED) & names, set(REFUSED) & names, set(passed_fields())]
    assert set.union(*places) >= names and sum(map(len, places)) == len(set.union(*places))
    parser_options = {option for group in tuning_options.OPTIONS.values() for option in group}
    for field, option in COVERED.items():
        names = [f"--{option}".replace("_", "-"), *ALIASES.get(f"--{option}".replace("_", "-"), {})]
        assert names[0] in parser_options and f"--{field}".replace("_", "-") in names, field
    assert {"optim", "adam_beta2", "torch_compile", "data_seed", "ddp_timeout", "run_name"} <= set(passed_fields())


def test_other_fields_are_passed_through_with_their_types():
    options = (
        "--adam_beta2 0.95 --optim adafactor --data-seed 5 --ddp_timeout 77 --run_name r --tf32 False "
        '--lr_scheduler_kwargs {"num_cycles":2} --dataloader_drop_last --per_device_eval_batch_size 9 '
        "--eval_strategy epoch --eval_share 0.5 --batch-size 2 --no_dataloader_pin_memory"
    )
    args = parse(*options.split())
    arguments = training_arguments(args)
    expected = {
        "adam_beta2": 0.95,
        "data_seed": 5,
        "ddp_timeout": 77,
        "run_name": "r",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "dataloader_drop_last": True,
        "per_device_eval_batch_size": 9,
        "per_device_train_batch_size": 2,
        "dataloader_pin_memory": False,
    }
    assert {name: getattr(arguments, name) for name in expected} == expected
    assert (str(arguments.optim.value), str(arguments.eval_strategy.value)) == ("adafactor", "epoch")
    checkpointing = {"use_reentrant": True}
    given = ["--gradient-checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}']
    assert training_arguments(parse(*given)).gradient_checkpointing_kwargs == checkpointing


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("moss_vl.training.requirements.get_available_reporting_integrations", lambda: ["mlflow"])
    for names, reason in (
        (["wandb"], "--report-to wandb needs the package wandb: pip install wandb"),
        (["mlflow", "comet_ml"], "--report-to comet_ml needs the package comet-ml"),
        (["wand"], "--report-to wand is unknown; did you mean 'wandb'?"),
    ):
        with pytest.raises((ImportError, ValueError), match=reason.replace("?", r"\?")):
            check_reporters(parse("--report-to", *names))
    args = parse("--report_to", "all")
    check_reporters(args)
    assert args.report_to == ["mlflow"]
    check_reporters(parse("--report_to", "none"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    packages = {"adamw_8bit": "bitsandbytes", "galore_adamw_8bit": "galore-torch", "lomo": "lomo-optim"}
    for name, package in packages.items():
        with pytest.raises(ImportError, match=f"--optim {name} needs the package {package}"):
            check_optimizer(name)
    for name in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", None):
        check_optimizer(name)


def test_a_folder_stands_for_its_data_files(tmp_path):
    for name in ("b.jsonl", "a.json", "picture.png"):
        (tmp_path / name).touch()
    assert [file.name for file in data_files([tmp_path])] == ["a.json", "b.jsonl"]
    assert data_files([Path("x.json")]) == [Path("x.json")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no data file in the folder"):
        data_files([tmp_path / "empty"])
