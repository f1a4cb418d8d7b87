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
from functools import partial
from pathlib import Path

import torch
from transformers import ViTImageProcessorPil, set_seed

from fmicl_text.cli.parser import cli_errors, default_settings, resolved_settings
from fmicl_text.cli.recipe import (
    claim_output_dir,
    end_together,
    finished_message,
    input_hashes,
    print_rank0,
    run_training,
    save_run,
)
from fmicl_text.cli.vision import parse_vision_args
from fmicl_text.evaluation.report import markdown_table
from fmicl_text.hub.run_record import scored_on
from fmicl_text.processes import check_processes
from fmicl_text.vision.architectures import IMAGE_CONFIGS
from fmicl_text.vision.data import Images, TrainingRows, check_channels, collate_images, load_digits, load_images, split
from fmicl_text.vision.encoder import build_image_encoder, new_image_encoder, pixel_statistics
from fmicl_text.vision.evaluator import KNNEvaluator
from fmicl_text.vision.model import ImageContrastiveModel
from fmicl_text.vision.views import ImageViews


def main() -> None:
    model_args, data_args, args = parse_vision_args()
    check_processes(args)
    settings = resolved_settings(model_args, data_args, args)
    if claim_output_dir(args, settings, default_settings(model_args, data_args, args)):
        print_rank0(args, finished_message(args))
        return

    set_seed(args.seed)
    if model_args.model_name_or_path is None:
        encoder = new_image_encoder(IMAGE_CONFIGS[model_args.architecture](), model_args.pooling)
    else:
        encoder = build_image_encoder(
            model_args.model_name_or_path,
            model_args.model_revision,
            model_args.pooling,
            model_args.trust_remote_code,
        )
    if data_args.train_file is None and data_args.dataset_name is None:
        images: Images = load_digits()
        check_channels(images, encoder.num_channels)
    else:
        images = load_images(
            data_args.train_file,
            data_args.dataset_name,
            data_args.dataset_split,
            data_args.image_column,
            data_args.label_column,
            encoder.num_channels,
        )
    train, test, validation = split(images, data_args.held_out, data_args.max_train_samples, data_args.validation)
    size, start = model_args.image_size, model_args.model_name_or_path
    known = pixel_statistics(start, encoder.num_channels, model_args.model_revision) if start else None
    mean, std = known or train.mean_and_std()
    print_rank0(
        args,
        f"{images.source}: {len(train.labels)} images to train on, {len(test.labels)} held out, "
        f"{len(images.skipped)} skipped {list(images.skipped[:3])}",
    )
    print_rank0(args, f"{args.method} {args.objective_name} {args.build_loss().hyperparameters} -> {args.output_dir}")

    processor = ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=mean, image_std=std)
    score = partial(
        KNNEvaluator, size=size, mean=mean, std=std, progress=args.process_index == 0 and not args.disable_tqdm
    )
    at_end, views = score(train, test), ImageViews(model_args.views, size, mean, std, model_args.color)
    model = ImageContrastiveModel(encoder, size, model_args.head_dim, processor)
    if args.world_size > 1 and args.device.type == "cuda":  # torch synchronizes batch norm on GPUs only
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    trainer = args.build_trainer(
        model,
        train_dataset=TrainingRows(train, size, views.crop, args.seed),
        data_collator=collate_images,
        evaluator=score(train, validation or test),
        views=views,
        optimizer_cls_and_kwargs=args.optimizer_class_and_kwargs(),
    )
    before = trainer.run_evaluator()
    rows = [
        at_end.probe("raw pixels", at_end.raw_pixels()),
        at_end.probe("before training", at_end.features(encoder)),
    ]
    metadata = {"source": images.source, "rows": len(train.labels), "skipped": list(images.skipped)}
    trainer.metadata = {
        "settings": settings,
        "inputs": input_hashes(settings),
        "before": before,
        "data": metadata,
        "scored_on": scored_on(f"{len(test.labels)} held-out images of {Path(images.source).name}"),
    }
    with trainer.hold_output_dir(args.resume_from_checkpoint):
        run_training(trainer)
        after = trainer.run_evaluator()
        rows.append(at_end.probe("after training", at_end.features(encoder)))
        trainer.metadata["data"] = metadata | {"probes": rows}
        save_run(trainer, after)
    print_rank0(args, markdown_table(rows))
    print_rank0(args, f"Saved encoder, model card, settings, results and training curve to {args.output_dir}")
    if args.push_to_hub:
        print_rank0(args, f"Pushed to the Hub: {trainer.push_to_hub()}")
    end_together(trainer)


if __name__ == "__main__":
    with cli_errors("vision_fmicl.py"):
        main()
