"""Train an image encoder with f-MICL on two random views of every image.

    accelerate launch recipes/vision_fmicl.py                                  # scikit-learn's digits, no download
    accelerate launch recipes/vision_fmicl.py --divergence js --config recipes/configs/vision/cifar10-resnet18.yaml \\
        --train_file cifar10/train.parquet
    accelerate launch recipes/vision_fmicl.py --objective infonce --train_file IMAGES --image_size 64 --output_dir OUT

After training, the output folder contains the encoder (a Hugging Face image model), its model card, settings.yaml,
results.json and training_curve.png.
"""

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from fmicl_text import FMICLTrainer
from fmicl_text.cli.parser import cli_errors, default_settings, resolved_settings
from fmicl_text.cli.recipe import (
    claim_output_dir,
    end_together,
    finished_message,
    input_hashes,
    judge_run,
    print_rank0,
    print_verdict,
    run_training,
    save_run,
)
from fmicl_text.cli.vision import ImageDataArguments, ImageModelArguments, parse_vision_args
from fmicl_text.errors import InputError
from fmicl_text.evaluation.report import before_after_table, markdown_table
from fmicl_text.hub.run_record import scored_on
from fmicl_text.processes import check_processes
from fmicl_text.training.ranks import on_main_process
from fmicl_text.vision.architectures import IMAGE_CONFIGS
from fmicl_text.vision.data import Images, ImageSets, TrainingRows, collate_images, load_digits, load_images
from fmicl_text.vision.encoder import ImageEncoder, build_image_encoder, new_image_encoder
from fmicl_text.vision.evaluator import ImageEvaluator
from fmicl_text.vision.model import ImageContrastiveModel
from fmicl_text.vision.preprocessing import Preprocessing, new_preprocessing, open_preprocessing
from fmicl_text.vision.sources import ImageStream
from fmicl_text.vision.streaming import StreamedRows, load_image_stream
from fmicl_text.vision.views import ImageViews


def main() -> None:
    model_args, data_args, args = parse_vision_args()
    check_processes(args)
    settings = resolved_settings(model_args, data_args, args)
    if claim_output_dir(args, settings, default_settings(model_args, data_args, args)):
        print_rank0(args, finished_message(args))
        return

    set_seed(args.seed)
    encoder = open_encoder(model_args)
    progress = args.process_index == 0 and not args.disable_tqdm
    stream, sets = read_images(data_args, encoder.num_channels, progress)
    train = sets.train
    if args.load_best_model_at_end and sets.validation is None:
        raise InputError(
            "load_best_model_at_end=True would select the checkpoint on the test images; hold out others with "
            "validation=N"
        )
    preprocessing = choose_preprocessing(model_args, encoder, train)
    held_out = sets.test or sets.validation
    print_rank0(args, describe_sets(sets, stream is not None))
    print_rank0(args, f"{args.method} {args.objective_name} {args.build_loss().hyperparameters} -> {args.output_dir}")

    size = preprocessing.size
    views = ImageViews(
        model_args.views, size, preprocessing.mean, preprocessing.std, model_args.color, preprocessing.channel_order
    )
    evaluator = None
    if held_out is None:
        args.check_without_evaluation()
        args.eval_strategy = "no"
    else:
        evaluator = ImageEvaluator(train, sets.test, preprocessing, views, data_args.probes, sets.validation, progress)
    model = ImageContrastiveModel(encoder, size, model_args.head_dim, preprocessing.processor)
    rows: Any = TrainingRows(train, size, views.crop, args.seed)
    if stream is not None:
        batch, limit = args.train_batch_size, data_args.max_train_samples
        rows = StreamedRows(stream, sets, encoder.num_channels, size, views.crop, args.seed, batch, limit)
        config: Any = args.accelerator_config
        if args.world_size > 1 and (config.split_batches or config.dispatch_batches):
            raise InputError("accelerator_config: split_batches and dispatch_batches do not work with streaming=True")
    if args.world_size > 1 and args.device.type == "cuda":  # torch synchronizes batch norm on GPUs only
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    trainer = args.build_trainer(
        model,
        train_dataset=rows,
        data_collator=collate_images,
        evaluator=evaluator,
        views=views,
        optimizer_cls_and_kwargs=args.optimizer_class_and_kwargs(),
    )
    before, start = evaluate(trainer, "before training"), trainer.scores
    data = {"source": train.source, "rows": None if stream else len(train), "skipped": list(train.skipped)}
    trainer.metadata = {
        "settings": settings,
        "inputs": on_main_process(lambda: input_hashes(settings)),
        "before": before,
        "data": data,
        "scored_on": scored_on(f"{len(held_out or ()) or 'No'} held-out images of {Path(train.source).name}"),
    }
    with trainer.hold_output_dir(args.resume_from_checkpoint):
        run_training(trainer)
        after = evaluate(trainer, "after training")
        judge_run(trainer, start)
        if stream is not None:
            data["images skipped in training"] = rows.num_skipped
        if evaluator and evaluator.table:
            trainer.metadata["data"] = data | {"probes": evaluator.table}
        save_run(trainer, after)
    if evaluator and evaluator.table:
        print_rank0(args, markdown_table(evaluator.table))
    elif evaluator:
        print_rank0(args, before_after_table(before, after))
    print_rank0(args, f"Saved encoder, model card, settings, results and training curve to {args.output_dir}")
    print_verdict(trainer)
    if args.push_to_hub:
        print_rank0(args, f"Pushed to the Hub: {trainer.push_to_hub()}")
    end_together(trainer)


def open_encoder(model_args: ImageModelArguments) -> ImageEncoder:
    """The encoder to train: an architecture with random weights, or a model."""
    if model_args.model_name_or_path is None:
        return new_image_encoder(IMAGE_CONFIGS[model_args.architecture](), model_args.pooling)
    return build_image_encoder(
        model_args.model_name_or_path, model_args.model_revision, model_args.pooling, model_args.trust_remote_code
    )


def read_images(data_args: ImageDataArguments, channels: int, progress: bool) -> tuple[ImageStream | None, ImageSets]:
    """The stream of training images, or None, and training, test and validation images; see `load_image_stream`."""
    counts = data_args.held_out, data_args.validation
    if data_args.train_file is None and data_args.dataset_name is None:
        return None, load_digits(channels, *counts, data_args.max_train_samples)
    source = (
        data_args.train_file,
        data_args.dataset_name,
        data_args.dataset_config,
        data_args.dataset_split,
        data_args.image_column,
        data_args.label_column,
        data_args.test_file,
        data_args.test_split,
    )
    if data_args.streaming:
        return load_image_stream(*source, channels, *counts, progress)
    return None, load_images(*source, channels, *counts, data_args.max_train_samples, progress)


def choose_preprocessing(model_args: ImageModelArguments, encoder: ImageEncoder, train: Images) -> Preprocessing:
    """That of the model's own image processor; without one, normalization by the training images."""
    start, size = model_args.model_name_or_path, model_args.image_size
    found = start and open_preprocessing(start, encoder.num_channels, size, model_args.model_revision)
    if not found:
        size = size or encoder.image_size
        if size is None:
            raise InputError(f"model_name_or_path={start} has no image processor: set image_size")
        found = new_preprocessing(size, *train.mean_and_std())
    encoder.check_shapes(found)
    return found


def describe_sets(sets: ImageSets, is_stream: bool) -> str:
    """The line of the log about the images."""
    train, skipped = sets.train, sets.train.skipped
    parts = [f"a stream, the first {len(train)} as neighbors" if is_stream else f"{len(train)} images to train on"]
    for name, images in (("validation", sets.validation), ("test", sets.test)):
        parts += [f"{len(images)} {name} images"] if images else []
    names = ", ".join(train.classes[:5]) + (", ..." if len(train.classes) > 5 else "")
    parts.append(f"{len(train.classes)} classes ({names})" if train.classes else "no classes")
    parts += [f"{len(skipped)} skipped ({'; '.join(skipped[:3])})"] if skipped else []
    line = f"{train.source}: {', '.join(parts)}"
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in line)  # names are of others


def evaluate(trainer: FMICLTrainer, row: str) -> dict[str, float]:
    """The scores of the encoder, which also become a row of the table of probes; none without held-out images."""
    evaluator: Any = trainer.evaluator
    if evaluator is None:
        return {}
    with evaluator.table_row(row):
        return trainer.run_evaluator()


if __name__ == "__main__":
    with cli_errors("vision_fmicl.py"):
        main()
