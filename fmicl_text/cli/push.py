"""Push a trained encoder to the Hub: what goes, what must not, and what went wrong, in one line.

    fmicl-text push OUT you/encoder                 # a folder that a recipe left
    fmicl-text push OUT you/encoder --dry-run       # what would go
    fmicl-text push OUT you/encoder --private --revision v2 --exist_ok

Only the encoder, its card and its training curve go: no head, no optimizer, no record of the run. Log in once with
`hf auth login`, or set HF_TOKEN.
"""

from __future__ import annotations

from pathlib import Path

from fmicl_text.cli.parser import ArgumentParser, cli_errors
from fmicl_text.hub.upload import check_repo_id, files_to_push, push


def main() -> None:
    parser = ArgumentParser("fmicl-text push", __doc__)
    parser.add_argument("folder", type=Path, help="what a recipe left")
    parser.add_argument("repo_id", help="you/name")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="list what would go")
    parser.add_argument("--private", action="store_true", default=None, help="if the repository is made here")
    parser.add_argument("--revision", help="a branch, made if need be")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request")
    parser.add_argument("--exist_ok", action="store_true", help="commit on top of what is there")
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder")
    if args.dry_run:
        check_repo_id(args.repo_id)
        for name in files_to_push(args.folder):
            print(f"{(args.folder / name).stat().st_size:>12,}  {name}")
        return
    options = {name: getattr(args, name) for name in ("private", "revision", "create_pr", "exist_ok")}
    print(push(args.folder, args.repo_id, **options))


if __name__ == "__main__":
    with cli_errors("fmicl-text push"):
        main()
