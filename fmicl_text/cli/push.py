"""Upload a trained encoder to the Hugging Face Hub.

    fmicl-text push OUT you/encoder                 # output folder of a recipe
    fmicl-text push OUT you/encoder --dry-run       # list the files that would be uploaded
    fmicl-text push OUT you/encoder --private --revision v2 --exist_ok

Only the encoder, its model card and the images in the card are uploaded: no head, no optimizer, no record of the run.
Before the upload, a copy of these files is opened and its embeddings are compared with the encoder's. Log in once with
`hf auth login`, or set HF_TOKEN.
"""

from __future__ import annotations

import os
from pathlib import Path

from fmicl_text.cli.parser import ArgumentParser, cli_errors
from fmicl_text.hub.upload import check_opens, check_repo_id, files_to_push, push
from fmicl_text.vision import architectures  # noqa: F401  # so that transformers knows its model type


def main() -> None:
    parser = ArgumentParser("fmicl-text push", __doc__)
    parser.add_argument("folder", type=Path, help="output folder of a recipe")
    parser.add_argument("repo_id", help="repository on the Hub: you/name")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="list the files that would be uploaded")
    parser.add_argument("--private", action="store_true", default=None, help="create the repository as private")
    parser.add_argument("--revision", help="branch to push to (created if missing)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request")
    parser.add_argument("--exist_ok", action="store_true", help="do not fail if the repository exists")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the encoder's custom code; review it first"
    )
    args = parser.parse_args()
    if not os.path.isdir(args.folder):
        parser.error(f"{args.folder}: no such folder")
    if args.dry_run:
        check_repo_id(args.repo_id)
        files = files_to_push(args.folder, args.trust_remote_code)
        check_opens(args.folder, files, args.trust_remote_code)
        for name in files:
            print(f"{(args.folder / name).stat().st_size:>12,}  {name}")
        return
    options = {
        name: getattr(args, name) for name in ("private", "revision", "create_pr", "exist_ok", "trust_remote_code")
    }
    print(push(args.folder, args.repo_id, **options))


if __name__ == "__main__":
    with cli_errors("fmicl-text push"):
        main()
