# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1 · Your first fine-tune
#
# | | two CPU cores | DGX Spark |
# |---|---|---|
# | time | about two minutes | not measured |
# | memory | under 2 GiB | under 2 GiB |
# | download | nothing | nothing |
#
# A small model ships with sparklab. It reads short messages in English and Arabic and answers questions about them, but it has never seen
# JSON. In this notebook you teach it to answer in JSON, watch it learn, and measure whether it helped.
#
# The order of things is the order of every fine-tune: *what have I got, will it fit, is my data right, how is it going, did it help?*

# %%
import sparklab as sl

sl.Box.detect()

# %% [markdown]
# ## Will it fit?
#
# The plan comes from the model's `config.json` alone. Nothing is loaded, nothing downloaded: the same line works for a model of 70 billion
# parameters, on a box you do not have yet (`box=sl.Box.profile("dgx-spark")`).

# %%
sl.plan("tiny")

# %% [markdown]
# ## The recipe and its data
#
# `sl.lesson` writes a thousand training records and two hundred that are held out, and returns the recipe that learns them. A recipe is a
# frozen value: everything the run depends on, and its `repr` is Python.

# %%
recipe = sl.lesson("lora", seed=0, folder="runs/lesson")
recipe

# %%
import json
from pathlib import Path

records = [json.loads(line) for line in Path(recipe.data).read_text(encoding="utf-8").splitlines()]
for record in records[:3]:
    for message in record["messages"]:
        print(f"{message['role']:>9}: {message['content']}")

# %% [markdown]
# ## Is the data right?
#
# What the model will see, before a single step is spent: every record as tokens, with what is learned of it marked green. Only the answers
# are, and the token that ends them. Page through, or look at what is odd; were something badly wrong, training would refuse it as well.

# %%
sl.inspect(recipe)

# %% [markdown]
# ## Train
#
# `sl.train` starts a worker process and returns at once: the notebook stays free, and closing it does not end the run. The panel below is
# live. When the run is over it becomes a picture that stays in the notebook.

# %%
run = sl.train(recipe, "runs/first")

# %%
1 + 1  # other cells run meanwhile

# %%
run.wait()

# %% [markdown]
# ## Did it help?
#
# The run answered the two hundred held-out orders before the first update and after the last one, and counted the answers that were right
# letter by letter.

# %%
before, after = (entry for entry in run.state.evals if entry["n"] > 0)
print(f"exact match: {before['exact_match']:.1%} before, {after['exact_match']:.1%} after, on {after['n']:.0f} held-out orders")

assert before["exact_match"] <= 0.05
assert after["exact_match"] >= 0.90

# %%
run.compare(
    [
        "Please send 12 red kites to Omar in Cairo by Friday.",
        "Layla in Oslo needs 7 small lamps by Monday.",
        "مطلوب أكواب خفيفة عدد 9 باسم ليلى في جنيف قبل يوم السبت.",
        "Please send 12 red kites to Omar in Cairo by Friday. Which city?",
    ]
)

# %% [markdown]
# ## It is all in a directory
#
# A run is a directory. Any kernel, any shell can open it, now or next year: `sl.Run.open("runs/first").panel()`, `sparklab watch runs/first`.
# The adapter in it is PEFT's own format.

# %%
sorted(path.name for path in run.path.iterdir())

# %% [markdown]
# ## Try it yourself
#
# **1.** What does the model make of an order that names no day?
#
# <details><summary>Solution</summary>
#
# ```python
# run.compare(["Please send 12 red kites to Omar in Cairo."])
# ```
#
# The tuned model has only ever seen orders with a day. Fine-tuning teaches the form of the answers it was shown.
#
# </details>
#
# **2.** Is a rank of 16 needed? Train with `recipe.replace(rank=2)` in another directory and compare the two exact matches.
#
# <details><summary>Solution</summary>
#
# ```python
# small = sl.train(recipe.replace(rank=2), "runs/rank-2").wait()
# small.evaluate()
# ```
#
# </details>
#
# **3.** What would the same recipe need on a DGX Spark for a model of 8 billion parameters? Give `sl.plan` a `config.json` and a box.
