"""Train a retriever on Natural Questions, or on data of yours, and evaluate it on the whole corpus.

    accelerate launch recipes/train_nq.py                                # the Hub's natural-questions, on what is there
    python recipes/train_nq.py --dataset data/nq --encoder static        # a BEIR folder, minutes on a CPU
    python recipes/train_nq.py --dataset pairs.parquet                   # pairs of your own, or .jsonl, .csv, a folder
    python recipes/train_nq.py --dataset mteb/fiqa                       # a retrieval data set on the Hub
    python recipes/train_nq.py --dataset data/nq --strategy exhaustive   # the expensive baseline

All of CorrectorTrainingArguments are understood, sentence-transformers' among them; those of this recipe come first in
--help.
"""

from command_line import main

if __name__ == "__main__":
    main("train_nq", __doc__, dataset="sentence-transformers/natural-questions")
