"""That ``hub.py`` stands in for the Hugging Face Hub: shown with the clients themselves."""

import inspect
import subprocess
import sys

import huggingface_hub
import pytest
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import DatasetCard, HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import get_session

TEXTS = ["word1 word3 word5", "word7"]
DATA_CARD = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/train.{ending}
- config_name: large
  data_files:
  - split: train
    path: large/train.{ending}
  - split: test
    path: large/test.{ending}
---
"""


@pytest.fixture
def api(hub):
    return HfApi()


def in_fresh_process(code, environment):
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def push_data(api, folder, ending, **options):
    """A repository of two configurations; ``text`` says where a row is from."""
    for name in ("small/train", "large/train", "large/test"):
        path = folder / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = Dataset.from_dict({"text": [f"{name} {row}" for row in range(3)]})
        rows.to_parquet(path) if ending == "parquet" else rows.to_json(path)
    (folder / "README.md").write_text(DATA_CARD.format(ending=ending))
    api.create_repo("tester/data", repo_type="dataset", **options)
    api.upload_folder(repo_id="tester/data", repo_type="dataset", folder_path=folder)


def test_a_private_repository_is_for_its_owner(hub, api, tmp_path):
    push_data(api, tmp_path / "data", "jsonl", private=True)
    arguments = {"repo_id": "tester/data", "repo_type": "dataset"}
    assert api.repo_info(**arguments).private
    before = len(hub.requests)
    strangers = HfApi(token=False)
    assert not strangers.repo_exists(**arguments)
    with pytest.raises(RepositoryNotFoundError):
        strangers.hf_hub_download(filename="README.md", **arguments)
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download(token=False, local_dir=tmp_path / "copy", **arguments)
    assert {(request.authorization, request.status) for request in hub.requests[before:]} == {(None, 401)}
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(token="hf_wrong").list_repo_files(**arguments)
    with pytest.raises(HfHubHTTPError, match="401"):
        strangers.create_repo("tester/other")
    with pytest.raises(DatasetNotFoundError):
        load_dataset("tester/data", "small", token=False)
    code = "from datasets import load_dataset; print(load_dataset('tester/data', 'small', split='train')['text'][0])"
    assert in_fresh_process(code, hub.environment()) == "small/train 0\n"


def test_strangers_read_what_is_public_and_do_not_write(hub, api):
    api.create_repo("tester/model")
    strangers = HfApi(token=False)
    assert strangers.list_repo_files("tester/model") == [".gitattributes"]
    with pytest.raises(HfHubHTTPError, match="401"):
        strangers.upload_file(path_or_fileobj=b"", path_in_repo="file", repo_id="tester/model")


def test_branches_and_old_commits(hub, api, tmp_path):
    api.create_repo("tester/model")
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("tester/model")
    assert api.create_repo("model", exist_ok=True).repo_id == "tester/model"

    def upload(content, **options):
        return api.upload_file(path_or_fileobj=content, path_in_repo="a/file", repo_id="tester/model", **options).oid

    def read(revision):
        with open(hf_hub_download("tester/model", "a/file", revision=revision), "rb") as file:
            return file.read()

    first = upload(b"first")
    second = upload(b"second")
    api.create_branch("tester/model", branch="side/way", revision=first)
    third = upload(b"third", revision="side/way")
    for revision, content in {first: b"first", second: b"second", "main": b"second"}.items():
        assert read(revision) == content
    assert read("side/way") == read(third) == b"third"
    assert upload(b"second") == second, "what has not changed is not committed"
    with pytest.raises(HfHubHTTPError, match="412"):
        upload(b"late", parent_commit=first)

    snapshot_download("tester/model", revision=first, local_dir=tmp_path / "old")
    assert (tmp_path / "old" / "a" / "file").read_bytes() == b"first"


def test_what_is_not_there_is_said_by_its_own_exception(hub, api):
    api.create_repo("tester/model")
    assert api.file_exists("tester/model", ".gitattributes")
    assert not api.file_exists("tester/model", "README.md")
    assert not api.repo_exists("tester/other")
    for arguments, error in {
        ("tester/other", "file", None): RepositoryNotFoundError,
        ("single-name", "file", None): RepositoryNotFoundError,
        ("tester/model", "file", None): EntryNotFoundError,
        ("tester/model", ".gitattributes", "no-branch"): RevisionNotFoundError,
    }.items():
        with pytest.raises(error):
            hf_hub_download(arguments[0], arguments[1], revision=arguments[2])
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"", path_in_repo="file", repo_id="tester/model", revision="no-branch")


def test_an_upload_is_what_was_announced(hub, api):
    api.create_repo("tester/model")
    announced = UploadInfo.from_bytes(b"announced")
    (upload,), _, _ = post_lfs_batch_info([announced], token=None, repo_type="model", repo_id="tester/model")
    address = upload["actions"]["upload"]["href"]
    assert get_session().put(address, content=b"something else").status_code == 400
    assert get_session().put(address, content=iter([b"anno", b"unced"])).status_code == 200, "sent in chunks"


CARD = "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [dense]\nbase_model: tester/model\n{}\n---\nText\n"
RESULTS = "model-index:\n- name: m\n  results:\n  - task: {type: retrieval}\n    dataset: {name: nq, type: nq}\n"
METRIC = "    metrics:\n    - {{type: mrr, value: {}}}"


@pytest.fixture
def validate(hub):
    if "constants.ENDPOINT" not in inspect.getsource(huggingface_hub.RepoCard.validate):
        pytest.skip("this version of huggingface_hub has cards checked at huggingface.co alone")
    return lambda card: card.validate()


@pytest.mark.parametrize("more", ["", "extra: {a: 1}", "license_name: mine", RESULTS + METRIC.format(0.5)])
def test_a_card_that_is_in_order_is_accepted(validate, more):
    validate(ModelCard(CARD.format(more)))
    validate(DatasetCard(DATA_CARD))


INVALID = {
    "language: English": '"language" with value "English" is not valid',
    "tags: sentence-transformers": '"tags" must be an array',
    "datasets: [null]": r'"datasets\[0\]" must be a string',
    "base_model: /home/me/outputs/model": '"base_model" with value "/home/me/outputs/model" is not valid',
    "library_name: [a]": '"library_name" must be a string',
    "unclosed: [a": "Invalid YAML",
    RESULTS: "'metrics'",
    RESULTS + METRIC.format(".nan"): "the value of mrr must be a number",
}


def upload_card(api, metadata, kind):
    readme = f"---\n{metadata}\n---\n".encode()
    api.upload_file(path_or_fileobj=readme, path_in_repo="README.md", repo_id="tester/cards", repo_type=kind)


@pytest.mark.parametrize(("metadata", "message"), INVALID.items())
def test_an_invalid_card_is_not_uploaded(hub, api, metadata, message):
    api.create_repo("tester/cards")
    with pytest.raises(ValueError, match=rf"(?s)Invalid metadata in README\.md.*{message}"):
        upload_card(api, metadata, "model")
    assert "README.md" not in hub.files("tester/cards")


def test_the_card_of_a_data_set_has_rules_of_its_own(hub, api):
    api.create_repo("tester/cards", repo_type="dataset")
    for metadata in ("configs:\n- data_files: train.jsonl", "configs:\n- config_name: a\n  data_files: 3"):
        with pytest.raises(ValueError, match=r"config_name|data_files"):
            upload_card(api, metadata, "dataset")


def test_what_is_not_served_is_said(hub, api):
    with pytest.raises(HfHubHTTPError, match="does not serve GET /api/models"):
        list(api.list_models())
