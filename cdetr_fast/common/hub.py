"""Uploads to the model hub."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

CARD_NAME = "README.md"


def upload(
    folder: Path,
    names: Iterable[str],
    repo_id: str,
    *,
    what: str = "model",
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Iterable[str] | str | None = None,
    api: Any = None,
) -> Any:
    """Upload files of a folder to a repository, created if necessary; return the commit.

    Args:
        folder: Where the files are.
        names: Their names.
        repo_id: Name of the repository, prefixed by the organisation if it is not the user's own.
        what: What is uploaded, for the title of the commit.
        commit_message: Title of the commit.
        commit_description: Its text.
        private: Make a new repository private.
        token: Access token; default the one of `hf auth login`.
        revision: Branch, created if necessary.
        create_pr: Open a pull request instead of committing.
        tags: Tags to add to the model card, which is made if there is none.
        api: Class of the client; default `huggingface_hub.HfApi`.
    """
    import huggingface_hub  # 0.2 s

    client = (api or huggingface_hub.HfApi)(token=token)
    repo_id = client.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        client.create_branch(repo_id, branch=revision, exist_ok=True)
    names = list(names)
    tags = [tags] if isinstance(tags, str) else list(dict.fromkeys(tags or ()))
    if tags and CARD_NAME not in names:
        _tagged_card(repo_id, tags, token).save(folder / CARD_NAME)
        names.append(CARD_NAME)
    return client.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=names,
        commit_message=commit_message or f"Upload {what}",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def _tagged_card(repo_id: str, tags: list[str], token: str | bool | None) -> Any:
    """Return the card of a repository, or a new one, with tags added."""
    from huggingface_hub import ModelCard, ModelCardData
    from huggingface_hub.errors import EntryNotFoundError

    try:
        card: Any = ModelCard.load(repo_id, token=cast("Any", token))
    except EntryNotFoundError:
        card = ModelCard(f"---\n{ModelCardData(library_name='transformers').to_yaml()}\n---\n")
    present = list(card.data.tags or ())
    card.data.tags = present + [tag for tag in tags if tag not in present]
    return card
