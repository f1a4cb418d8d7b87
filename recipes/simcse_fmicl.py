"""Train a sentence encoder with f-MICL on dropout positives (or pairs, or triplets), and score it on STS pairs.

    accelerate launch recipes/simcse_fmicl.py --divergence kl                                  # bundled model and data
    accelerate launch recipes/simcse_fmicl.py --config recipes/configs/text/bert-base-kl.yaml  # the paper's run
    accelerate launch recipes/simcse_fmicl.py --divergence js --model_name_or_path MODEL \\
        --train_file SENTENCES.txt --sts_dev_file DEV.tsv --output_dir OUT

Options can also be read from a YAML file (--config); flags on the command line override it. After training, OUT
contains the encoder (a SentenceTransformer folder), its model card, settings.yaml, results.json and training_curve.png.
"""

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split
from pathlib import Path

from transformers import set_seed

from fmicl_text import FMICLTrainer, TextContrastiveModel, build_text_encoder
from fmicl_text.cli.parser import cli_errors, default_settings, resolved_settings
from fmicl_text.cli.recipe import (
    check_processes,
    claim_output_dir,
    end_together,
    finished_message,
    input_hashes,
    print_rank0,
    run_training,
    save_run,
)
from fmicl_text.cli.text import announce, parse_args
from fmicl_text.evaluation.evaluator import STSEvaluator
from fmicl_text.evaluation.report import before_after_table
from fmicl_text.evaluation.sts import STSB_HUB_NAME, load_pairs, load_stsb
from fmicl_text.hub.run_record import scored_on
from fmicl_text.loading import hub_revision
from fmicl_text.text.data import load_training_text
from fmicl_text.text.model import pooling_source
from fmicl_text.text.tokenization import training_rows


def main() -> None:
    model_args, data_args, args = parse_args()
    print_rank0(args, announce(model_args, data_args, args))
    check_processes(args)
    settings = resolved_settings(model_args, data_args, args)
    if claim_output_dir(args, settings, default_settings(model_args, data_args, args)):
        print_rank0(args, finished_message(args))
        return

    set_seed(args.seed)
    encoder = build_text_encoder(
        str(model_args.model_name_or_path),
        model_args.model_revision,
        model_args.pooling,
        model_args.dropout,
        model_args.lora_rank,
        model_args.load_in,
        model_args.trust_remote_code,
    )
    model = TextContrastiveModel(encoder, model_args.head)  # one dry pass, before the text is read
    print_rank0(args, f"Pooling: {pooling_source(encoder, model_args.pooling)}")
    with args.main_process_first(desc="reading the training text"):  # the other processes read the cache
        data = load_training_text(
            data_args.train_file,
            data_args.dataset_name,
            data_args.dataset_config,
            data_args.dataset_split,
            data_args.text_column,
            data_args.streaming,
            data_args.max_train_samples,
            shuffle_seed=args.seed,
            at_least=args.train_batch_size * args.world_size,
        )
        rows, collator = training_rows(data, encoder.tokenizer, data_args.max_seq_length, data_args.tokenize_once)
    print_rank0(args, "Training text: " + ", ".join(f"{name} {value}" for name, value in data.metadata().items()))
    if data_args.sts_dev_file:
        pairs, scored = load_pairs(data_args.sts_dev_file), scored_on(Path(data_args.sts_dev_file).name)
    else:
        pairs = load_stsb("dev")
        scored = scored_on("STS Benchmark, dev", STSB_HUB_NAME, "STSBenchmark", "validation", hub_revision(pairs))
    trainer = FMICLTrainer(
        model,
        args,
        train_dataset=rows,
        data_collator=collator,
        evaluator=STSEvaluator(pairs, progress=args.process_index == 0 and not args.disable_tqdm),
    )
    before = trainer.run_evaluator()
    trainer.metadata = {"settings": settings, "inputs": input_hashes(settings), "before": before}
    trainer.metadata |= {"data": data.metadata(), "scored_on": scored}
    with trainer.hold_output_dir(args.resume_from_checkpoint):
        run_training(trainer)
        after = trainer.run_evaluator()
        save_run(trainer, after)
    print_rank0(args, before_after_table(before, after))
    print_rank0(args, f"Saved encoder, model card, settings, results and training curve to {args.output_dir}")
    if args.push_to_hub:
        print_rank0(args, f"Pushed to the Hub: {trainer.push_to_hub()}")
    end_together(trainer)


if __name__ == "__main__":
    with cli_errors("simcse_fmicl.py"):
        main()
