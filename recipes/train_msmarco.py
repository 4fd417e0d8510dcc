"""Train a retriever on MS MARCO with negatives from all of its passages, and evaluate it on them.

    accelerate launch recipes/train_msmarco.py --bf16 True               # all passages, official train and dev queries
    … --streaming True                                                   # without downloading the files first
    … --dataset sentence-transformers/msmarco --dataset_config triplets  # all passages, the ids of official triplets
    … --dataset sentence-transformers/msmarco --dataset_config labeled-list
    … --dataset sentence-transformers/msmarco-bm25 --dataset_config triplet      # triplets of texts: fewer passages

The default is MTEB's copy, since its judgements name every passage that is known to be relevant (what triplets leave
out could be chosen as a negative) and its dev queries are those of published figures. Of triplets, --eval_queries of
the training queries are held out as dev, and what they call negatives are passages among others: which ones a step
takes, the model decides.

The embedding cache is in int8, a quarter of the size. The whole corpus is encoded three times: for the cache, and to
evaluate before and after.

All of CorrectorTrainingArguments are understood, sentence-transformers' among them; those of this recipe come first in
--help.
"""

from command_line import main

if __name__ == "__main__":
    main("train_msmarco", __doc__, dataset="mteb/msmarco", cache_dtype="int8")
