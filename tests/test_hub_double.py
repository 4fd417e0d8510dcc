"""That ``hub.py`` stands in for the Hugging Face Hub: shown with the clients themselves."""

import inspect
import os
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from conftest import make_bert_model
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import DatasetCard, HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import get_session
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

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


@pytest.mark.long
def test_a_pushed_model_is_the_same_in_a_fresh_process(hub, tmp_path):
    model = make_bert_model(tmp_path)
    address = model.push_to_hub("model")
    assert address.startswith(f"{hub.url}/tester/model/commit/")
    assert [request.status for request in hub.requested("^PUT /lfs/")] == [200], "the weights go by Git LFS"
    assert {"modules.json", "model.safetensors", "README.md"} <= hub.files("tester/model").keys()
    before = len(hub.requests)
    code = (
        "import sys, torch; from sentence_transformers import SentenceTransformer;"
        f"model = SentenceTransformer('tester/model', device='cpu', revision={address.rsplit('/')[-1]!r});"
        f"torch.save(model.encode({TEXTS}, convert_to_tensor=True), {str(tmp_path / 'embeddings.pt')!r})"
    )
    in_fresh_process(code, hub.environment())
    assert torch.equal(torch.load(tmp_path / "embeddings.pt"), model.encode(TEXTS, convert_to_tensor=True))
    loaded = hub.requests[before:]
    assert any(request.path.endswith("/model.safetensors") for request in loaded)
    assert {request.authorization for request in loaded} == {f"Bearer {hub.token}"}


def test_a_trainer_makes_the_repository_and_pushes_to_it(hub, static_model, tmp_path):
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        report_to="none",
        use_cpu=True,
        push_to_hub=True,
        hub_private_repo=True,
        hub_strategy="every_save",
    )
    pairs = Dataset.from_dict({"anchor": ["word0", "word2"], "positive": ["word1", "word3"]})
    loss = MultipleNegativesRankingLoss(static_model)
    trainer = SentenceTransformerTrainer(static_model, arguments, train_dataset=pairs, loss=loss)
    assert hub.repositories["model", "tester/run"].private
    trainer.train()
    trainer.push_to_hub()
    titles = [commit.title for commit in hub.repositories["model", "tester/run"].commits.values()]
    assert "Training in progress, step 1" in titles
    assert titles[-1] == "End of training"
    there = SentenceTransformer("tester/run", device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert torch.equal(there, static_model.encode(TEXTS, convert_to_tensor=True))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_load_dataset_reads_the_configurations_of_the_card(hub, api, tmp_path, ending, streaming):
    push_data(api, tmp_path / "data", ending)
    for name, split in (("small", "train"), ("large", "train"), ("large", "test")):
        rows = load_dataset("tester/data", name, split=split, streaming=streaming)
        assert [row["text"] for row in rows] == [f"{name}/{split} {row}" for row in range(3)]
    with pytest.raises(ValueError, match=r"small.*large"):
        load_dataset("tester/data", "huge", streaming=streaming)


def test_a_dataset_pushed_by_datasets_comes_back(hub):
    rows = Dataset.from_dict({"query": ["word0", "word2"], "label": [3, 4]})
    rows.push_to_hub("tester/rows", "pairs", split="dev", private=True)
    assert hub.repositories["dataset", "tester/rows"].private
    assert load_dataset("tester/rows", "pairs", split="dev").to_dict() == rows.to_dict()


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
    with pytest.raises(HfHubHTTPError, match="401"):
        strangers.create_tag("tester/model", tag="v1")


def test_the_token_says_who_one_is(hub, api):
    assert api.whoami()["name"] == "tester"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")
    assert hub.requested("whoami")[-1].authorization == "Bearer hf_wrong"


def test_branches_tags_and_old_commits(hub, api, tmp_path):
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
    api.create_tag("tester/model", tag="v1")
    second = upload(b"second")
    api.create_branch("tester/model", branch="side/way", revision=first)
    third = upload(b"third", revision="side/way")
    for revision, content in {first: b"first", "v1": b"first", second: b"second", "main": b"second"}.items():
        assert read(revision) == content
    assert read("side/way") == read(third) == b"third"
    refs = api.list_repo_refs("tester/model")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "side/way": third}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
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
        ("tester/model", ".gitattributes", "refs/pr/1"): RevisionNotFoundError,
    }.items():
        with pytest.raises(error):
            hf_hub_download(arguments[0], arguments[1], revision=arguments[2])
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"", path_in_repo="file", repo_id="tester/model", revision="no-branch")
    with pytest.raises(HfHubHTTPError, match="no pull requests"):
        api.upload_file(path_or_fileobj=b"", path_in_repo="file", repo_id="tester/model", create_pr=True)


def test_folders_are_listed_and_files_deleted(hub, api, tmp_path):
    for name in ("a/b/one.txt", "a/two.npy", "three.txt"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(name.encode())
    api.create_repo("tester/model")
    api.upload_folder(repo_id="tester/model", folder_path=tmp_path / "folder")
    files = [".gitattributes", "a/b/one.txt", "a/two.npy", "three.txt"]
    assert api.list_repo_files("tester/model") == files
    assert [item.path for item in api.list_repo_tree("tester/model", "a")] == ["a/b", "a/two.npy"]
    infos = api.get_paths_info("tester/model", ["a/two.npy", "three.txt", "a", "nothing"])
    assert [(info.path, getattr(info, "lfs", None) is not None) for info in infos] == [
        ("a/two.npy", True),
        ("three.txt", False),
        ("a", False),
    ]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("tester/model", "nothing"))
    api.delete_folder("a/b", "tester/model")
    api.delete_file("three.txt", "tester/model")
    assert hub.files("tester/model").keys() == {".gitattributes", "a/two.npy"}
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("three.txt", "tester/model")


def test_a_download_that_was_cut_goes_on(hub, api):
    content = os.urandom(24 * 2**20)
    api.create_repo("tester/model")
    api.upload_file(path_or_fileobj=content, path_in_repo="weights.bin", repo_id="tester/model")
    hub.cut("^GET .*weights.bin", after=15 * 2**20)
    try:
        path = hf_hub_download("tester/model", "weights.bin")
    except Exception:  # huggingface_hub 1 goes on when it is called again, 2 by itself
        path = hf_hub_download("tester/model", "weights.bin")
    with open(path, "rb") as file:
        assert file.read() == content
    chunk = huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE
    downloads = hub.requested("^GET .*weights.bin")
    assert [(got.range, got.status) for got in downloads] == [(None, None), (f"bytes={chunk}-", 206)]
    assert [got.sent for got in downloads] == [15 * 2**20, len(content) - chunk]


def test_an_upload_that_was_cut_or_refused_goes_on(hub, api, tmp_path):
    (tmp_path / "folder").mkdir()
    content = os.urandom(2**22)
    (tmp_path / "folder" / "weights.bin").write_bytes(content)
    api.create_repo("tester/model")
    hub.cut("^PUT", after=2**20)
    hub.fail("^POST .*/commit/")
    failures = 0
    while "weights.bin" not in hub.files("tester/model"):
        try:
            api.upload_folder(repo_id="tester/model", folder_path=tmp_path / "folder")
        except (HfHubHTTPError, RuntimeError):  # huggingface_hub 2 sends the file again by itself, 1 need not
            failures += 1
            assert failures < 3
    assert hub.files("tester/model")["weights.bin"] == content
    assert [commit.status for commit in hub.requested("^POST .*/commit/")] == [503, 200]
    # Not uploaded again after the commit had failed:
    assert [(put.received, put.status) for put in hub.requested("^PUT")] == [(2**20, None), (2**22, 200)]


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
    "license: my-own": '"license" must be one of',
    "language: English": '"language" with value "English" is not valid',
    "tags: sentence-transformers": '"tags" must be an array',
    "datasets: [null]": r'"datasets\[0\]" must be a string',
    "base_model: /home/me/outputs/model": '"base_model" with value "/home/me/outputs/model" is not valid',
    "library_name: [a]": '"library_name" must be a string',
    "unclosed: [a": "Invalid YAML",
    RESULTS: "'metrics'",
    RESULTS + METRIC.format(".nan"): "the value of mrr must be a number",
}


class CardAsWritten(ModelCard):
    """Not parsed before it is sent: the client itself would refuse some of what the server is to refuse."""

    def __init__(self, metadata):
        self.readme = f"---\n{metadata}\n---\nText\n"

    def __str__(self):
        return self.readme


@pytest.mark.parametrize(("metadata", "message"), INVALID.items())
def test_an_invalid_card_is_refused(validate, metadata, message):
    with pytest.raises(ValueError, match=message):
        validate(CardAsWritten(metadata))


def upload_card(api, metadata, kind):
    readme = f"---\n{metadata}\n---\n".encode()
    api.upload_file(path_or_fileobj=readme, path_in_repo="README.md", repo_id="tester/cards", repo_type=kind)


@pytest.mark.parametrize("metadata", INVALID)
def test_an_invalid_card_is_not_uploaded(hub, api, metadata):
    api.create_repo("tester/cards")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
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
