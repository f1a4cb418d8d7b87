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
from typing import Any

from transformers import set_seed

from fmicl_text import FMICLTrainer, TextContrastiveModel, build_text_encoder
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
from fmicl_text.cli.text import STSB, DataArguments, announce, parse_args, without_evaluation
from fmicl_text.evaluation.evaluator import STSEvaluator
from fmicl_text.evaluation.report import before_after_table
from fmicl_text.evaluation.retrieval import load_retrieval
from fmicl_text.evaluation.sts import STSB_HUB_NAME, load_pairs, load_stsb
from fmicl_text.evaluation.unlabeled import UnlabeledEvaluator
from fmicl_text.hub.run_record import scored_on
from fmicl_text.loading import hub_revision
from fmicl_text.processes import check_processes
from fmicl_text.text.data import TextData, load_training_text
from fmicl_text.text.model import pooling_source, set_prompts, training_prompts
from fmicl_text.text.settings import prompt_text
from fmicl_text.text.static import tokenizer_of
from fmicl_text.text.tokenization import training_rows
from fmicl_text.text.views import choose_views


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
        model_args.trained_layers,
    )
    given = data_args.prompts and [prompt_text(encoder, prompt) for prompt in data_args.prompts]
    if given:
        set_prompts(encoder, given)
    model = TextContrastiveModel(encoder, model_args.head)  # one dry pass, before the text is read
    print_rank0(args, f"Pooling: {pooling_source(encoder, model_args.pooling)}")
    with args.main_process_first(desc="reading the training text"):  # the other processes read the cache
        data = load_training_text(
            data_args.train_file,
            data_args.dataset_name,
            data_args.dataset_config,
            data_args.dataset_split,
            data_args.text_columns,
            data_args.streaming,
            data_args.max_train_samples,
            shuffle_seed=args.seed,
            at_least=args.train_batch_size * args.world_size,
            held_out=data_args.num_held_out,
        )
        prompts = training_prompts(encoder, len(data.columns), given, bool(data_args.retrieval_dev_folder))
        views, chosen_views = choose_views(encoder, data, data_args.max_seq_length, prompts, data_args.views)
        rows, collator, data = training_rows(data, tokenizer_of(encoder), data_args.max_seq_length, prompts, views)
    if len(data.columns) > 1:
        args.choose_negatives_of_pairs()
    args.choose_sampling(len(data.columns), data_args.streaming)
    facts = data.metadata() | {"negatives": args.build_loss().negatives, "batches": args.train_sampling_strategy}
    print_rank0(args, "Training text: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    print_rank0(args, f"Views: {chosen_views}")
    if len(set(prompts)) > 1 and data_args.sts_dev_file:
        print_rank0(args, "The STS pairs are encoded without the prompts of queries and documents")
    length = views.read_length if views else data_args.max_seq_length  # crops read more than one view
    evaluator, scored = make_evaluator(data_args, data, length, args.process_index == 0 and not args.disable_tqdm)
    if evaluator is None:
        without_evaluation(args, reason := data.held_out.reason or "held_out=0")
        print_rank0(args, f"No evaluation, the last weights are saved ({reason}). To evaluate, pass --sts_dev_file")
    else:
        print_rank0(args, f"Evaluation: {scored['name']}")
    trainer = FMICLTrainer(
        model,
        args,
        train_dataset=rows,
        data_collator=collator,
        evaluator=evaluator,
    )
    before = trainer.run_evaluator() if evaluator else {}
    start = trainer.scores
    trainer.metadata = {"settings": settings, "inputs": input_hashes(settings), "before": before}
    trainer.metadata |= {"data": data.metadata() | {"views": chosen_views}, "scored_on": scored}
    with trainer.hold_output_dir(args.resume_from_checkpoint):
        run_training(trainer)
        after = trainer.run_evaluator() if evaluator else {}
        judge_run(trainer, start)
        save_run(trainer, after)
    if evaluator:
        print_rank0(args, before_after_table(before, after))
    print_rank0(args, f"Saved encoder, model card, settings, results and training curve to {args.output_dir}")
    print_verdict(trainer)
    if args.push_to_hub:
        print_rank0(args, f"Pushed to the Hub: {trainer.push_to_hub()}")
    end_together(trainer)


def make_evaluator(data_args: DataArguments, data: TextData, length: int, progress: bool) -> tuple[Any, dict[str, Any]]:
    """The evaluator that selects the checkpoint, and what the record says about its data; None if there are none.

    Args:
        data_args, data: Options and training text.
        length: Tokens per held-out text.
        progress: Show progress bars.
    """
    if data_args.retrieval_dev_folder:
        folder = Path(data_args.retrieval_dev_folder)
        return load_retrieval(folder, progress=progress), scored_on(folder.name)
    if data_args.sts_dev_file == STSB:
        pairs = load_stsb("dev")
        revision = hub_revision(pairs)
        scored = scored_on("STS Benchmark, dev", STSB_HUB_NAME, "STSBenchmark", "validation", revision)
        return STSEvaluator(pairs, progress=progress), scored
    if data_args.sts_dev_file:
        file = Path(data_args.sts_dev_file)
        return STSEvaluator(load_pairs(str(file)), progress=progress), scored_on(file.name)
    rows = data.held_out.rows
    if not rows:
        return None, scored_on("no evaluation data")
    options: dict[str, Any] = {"max_seq_length": length, "prompts": data.prompts}
    name = f"{len(rows):,} held-out {'texts' if len(rows[0]) == 1 else 'pairs'} of the training data"
    return UnlabeledEvaluator(rows, progress=progress, **options), scored_on(name)


if __name__ == "__main__":
    with cli_errors("simcse_fmicl.py"):
        main()
