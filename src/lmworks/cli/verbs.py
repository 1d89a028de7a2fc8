"""The verbs: where each lives, what it does, two examples. The command line's help is made of this table alone."""

from __future__ import annotations

from lmworks.cli.verbs_serving import SERVING

VERBS = {  # verb -> where it lives, what it does, two examples
    "clean": (
        "lmworks.cli.clean:clean",
        "Clean a corpus of any size: encodings, mojibake, markup, boilerplate, languages, duplicates.",
        (
            "lmworks clean texts/ -o corpus.jsonl --dedup near",
            "lmworks clean book.txt -o words.txt --steps nfc,lower,punctuation,digits",
        ),
    ),
    "split": (
        "lmworks.cli.clean:split",
        "Share documents out into train, validation and test files; near duplicates stay on one side.",
        (
            "lmworks split corpus.jsonl -o parts",
            "lmworks split reviews.csv -o parts --shares 0.9,0.1 --stratify label --seed 1",
        ),
    ),
    "augment": (
        "lmworks.cli.clean:augment",
        "Add changed copies of texts to train on: words swapped, left out or mistyped.",
        (
            "lmworks augment parts/train.jsonl -o more.jsonl --copies 3",
            "lmworks augment reviews.csv -o more.jsonl --ways drop,typo --share 0.2",
        ),
    ),
    "stats": (
        "lmworks.cli.clean:stats",
        "Measure a corpus: words, Zipf's law, lengths, quality, diversity, and whether a sample represents it.",
        (
            "lmworks stats corpus.jsonl --report corpus.html",
            "lmworks stats books/ --unit paragraph --sample sample.txt --json",
        ),
    ),
    "build": (
        "lmworks.cli.build:build",
        "Text to a verified model in a web page, in one command.",
        ("lmworks build -o demo", "lmworks build my_texts/ -o my_model --size small"),
    ),
    "train": (
        "lmworks.cli.build:train",
        "Text to a tokenizer and a trained model, in the Hugging Face layout.",
        ("lmworks train books/ -o my_model", "lmworks train input.txt -o my_model --tokenizer char --steps 2000"),
    ),
    "ngram train": (
        "lmworks.cli.ngram:train",
        "Count and smooth the lines of a text; model.arpa is among the files.",
        (
            "lmworks ngram train book.txt --order 5 -o counts",
            "lmworks ngram train book.txt --order 2 --smoothing mle -o bigrams",
        ),
    ),
    "ngram eval": (
        "lmworks.cli.ngram:evaluate",
        "Perplexity, bits per byte and unknown words; every line's end is counted, blank lines are skipped.",
        ("lmworks ngram eval counts held_out.txt", "lmworks ngram eval kenlm.arpa held_out.txt --json"),
    ),
    "ngram sample": (
        "lmworks.cli.ngram:sample",
        "Draw sentences from an n-gram model.",
        ("lmworks ngram sample counts", 'lmworks ngram sample counts --prompt "It was" --count 3 --seed 7'),
    ),
    "ngram table": (
        "lmworks.cli.ngram:table",
        "Conditional probabilities: P(jumps | fox) = 1.0000.",
        ('lmworks ngram table bigrams "fox"', 'lmworks ngram table counts "<s>" --top 5 --json'),
    ),
    "ngram score": (
        "lmworks.cli.ngram:score",
        "The log-probability of a sentence, token by token.",
        ('lmworks ngram score counts "the quick brown fox"', 'lmworks ngram score kenlm.arpa "a fox" --json'),
    ),
    "finetune": (
        "lmworks.cli.finetune:finetune",
        "Fine-tune a checkpoint on labelled data: all of it, its head, or a LoRA adapter.",
        (
            "lmworks finetune my_encoder reviews.csv --task text-classification -o my_classifier",
            "lmworks finetune my_classifier more.jsonl --method lora --rank 8 -o my_adapter",
        ),
    ),
    "distill": (
        "lmworks.cli.distill:distill",
        "Teach a smaller model what a fine-tuned one says: fewer of its layers, or another checkpoint.",
        (
            "lmworks distill my_classifier reviews.csv --layers 3 -o my_small_classifier",
            "lmworks distill my_classifier reviews.csv --student small_encoder --temperature 4 -o out",
        ),
    ),
    "tokenizer train": (
        "lmworks.cli.tokenizer:train",
        "Train a tokenizer on texts of any size: words, characters, BPE, WordPiece or Unigram.",
        (
            "lmworks tokenizer train books/ --kind bpe --vocab-size 8000 -o my_tokenizer",
            "lmworks tokenizer train corpus.txt --kind unigram --vocab-size 16000 --sample 0.1 -o my_tokenizer",
        ),
    ),
    "tokenizer compare": (
        "lmworks.cli.tokenizer:compare",
        "Compare tokenizers on texts: tokens a word, unknown words, what is lost, speed, and models trained on each.",
        (
            "lmworks tokenizer compare words chars my_model --data held_out.txt",
            "lmworks tokenizer compare bpe unigram --data languages/ --html compare.html --train-models 300",
        ),
    ),
    "tokenizer extend": (
        "lmworks.cli.tokenizer:extend",
        "Give a model more tokens, their rows the mean of their old pieces, and prove that old texts keep their ids.",
        (
            "lmworks tokenizer extend my_model words.txt -o my_larger_model",
            "lmworks tokenizer extend my_model medical.txt --count 500 -o my_larger_model",
        ),
    ),
    "tokenizer inspect": (
        "lmworks.cli.tokenizer:inspect",
        "Look into a tokenizer: its steps, tokens and traps, and how it cuts a text.",
        ('lmworks tokenizer inspect my_model "A text to cut"', "lmworks tokenizer inspect my_tokenizer --json"),
    ),
    "quantize": (
        "lmworks.cli.compress:quantize",
        "Round a model to 8 or 4 bits, or find the smallest that keeps a budget of quality, speed and size.",
        (
            "lmworks quantize my_classifier -o smaller",
            'lmworks quantize my_classifier --data reviews.csv --budget "accuracy>=-1%, speed>=2x" -o smaller',
        ),
    ),
    "prune": (
        "lmworks.cli.compress:prune",
        "Take weights, neurons or ranks away, and fine-tune what is left; or keep a budget.",
        (
            "lmworks prune my_classifier --sparsity 0.5 -o sparse",
            "lmworks prune my_classifier --structured --sparsity 0.25 --data reviews.csv --epochs 1 -o narrower",
        ),
    ),
    "tune": (
        "lmworks.cli.tune:tune",
        "Search the settings of finetune: many trials, resumable, in several processes.",
        (
            "lmworks tune my_encoder reviews.csv --trials 24 --storage search.jsonl -o my_classifier",
            "lmworks tune my_encoder reviews.csv --search grid --space optimizer=sgd,adam,adamw --seeds 3 "
            "--storage grid.jsonl -o best",
        ),
    ),
    "generate": (
        "lmworks.cli.predict:generate",
        "Continue a prompt; the text appears as it is made.",
        (
            'lmworks generate my_model "Once upon a time"',
            "lmworks generate my_model --temperature 0 --json < prompt.txt",
        ),
    ),
    "predict": (
        "lmworks.cli.tasks:predict",
        "Answer by whatever a model was made for.",
        ('lmworks predict my_model "I love it"', "lmworks predict my_model --file texts.txt --json"),
    ),
    "classify": (
        "lmworks.cli.tasks:classify",
        "Label texts or images: every label with its score, the likeliest first.",
        ('lmworks classify my_classifier "I love it"', "lmworks classify my_classifier --file reviews.txt --json"),
    ),
    "ner": (
        "lmworks.cli.tasks:ner",
        "Find the names in texts, with their places.",
        (
            'lmworks ner my_tagger "Ada lives in London"',
            "lmworks ner my_tagger --aggregation simple --json < texts.txt",
        ),
    ),
    "qa": (
        "lmworks.cli.tasks:qa",
        "Answer questions from a text of any length.",
        (
            'lmworks qa my_reader --question "Who wrote it?" --context "Ada wrote it."',
            'lmworks qa my_reader --question "Who wrote it?" --file book.txt --json',
        ),
    ),
    "fill-mask": (
        "lmworks.cli.tasks:fill_mask",
        "Fill the masks in texts with the likeliest tokens.",
        (
            'lmworks fill-mask my_encoder "Paris is the [MASK] of France."',
            'lmworks fill-mask my_encoder "It was [MASK]." --targets good --targets bad --json',
        ),
    ),
    "embed": (
        "lmworks.cli.tasks:embed",
        "Turn texts into vectors, or search a file by meaning.",
        (
            'lmworks embed my_encoder "how much money do I have" --search questions.txt',
            "lmworks embed my_encoder --file texts.txt --json",
        ),
    ),
    "evaluate": (
        "lmworks.cli.predict:evaluate",
        "Score a model: perplexity on a text, or accuracy, F1 or exact match on labelled data.",
        ("lmworks evaluate my_model held_out.txt", "lmworks evaluate my_classifier test.csv --json"),
    ),
    "compare": (
        "lmworks.cli.compare:compare",
        "Put runs and models side by side: size, time, convergence, scores, and whether differences are chance.",
        (
            "lmworks compare lstm transformer counts --data held_out.txt --html compare.html",
            "lmworks compare my_classifier my_small_classifier --data test.csv",
        ),
    ),
    "verify": (
        "lmworks.cli.check:verify",
        "Prove that every runtime gives torch's answers and logits, or that a checkpoint gives transformers' numbers.",
        ("lmworks verify page_1 page_2 --runtimes onnx,node", "lmworks verify my_checkpoint --against transformers"),
    ),
    "export": (
        "lmworks.cli.export:export",
        "Write a checkpoint, however old its files, in today's Hugging Face layout.",
        ("lmworks export my_checkpoint --to hf -o clean", "lmworks export my_classifier --to web -o page"),
    ),
    "merge": (
        "lmworks.cli.merge:merge",
        "Add an adapter (a PEFT folder) to its base for good, and show that the answers stay.",
        ("lmworks merge my_adapter -o merged", "lmworks merge my_adapter --base org/name -o merged --json"),
    ),
    "convert": (
        "lmworks.cli.convert:convert",
        "Turn pytorch_model.bin into model.safetensors; nothing in it is run, and what it asks for is listed.",
        ("lmworks convert old_checkpoint -o checkpoint", "lmworks convert org/name -o checkpoint --json"),
    ),
    "inspect": (
        "lmworks.cli.hub:inspect",
        "Describe a model folder: structure, parameters, files, tokenizer, labels, and what is wrong with it.",
        ("lmworks inspect my_model", "lmworks inspect my_model --json"),
    ),
    "pull": (
        "lmworks.cli.hub:pull",
        "Fetch a model from the Hub into the shared cache.",
        ("lmworks pull dslim/bert-base-NER", "lmworks pull roberta-base --revision main"),
    ),
    "new": (
        "lmworks.cli.new:new",
        "Make a playground: examples for each task, one file each, pinned to this version.",
        ("lmworks new demo --native", "lmworks new demo --docker"),
    ),
    "add playground": (
        "lmworks.cli.new:add",
        "Make a playground inside a project, none of whose files change.",
        ("lmworks add playground --native", "lmworks add playground --docker"),
    ),
    "doctor": (
        "lmworks.cli.hub:doctor",
        "Look at the installation and the machine, and say how to mend what is broken.",
        ("lmworks doctor", "lmworks doctor --json"),
    ),
} | SERVING
GROUPS = {  # verbs of two words
    "add": "Add something of its own to a project.",
    "tokenizer": "Train, compare, extend and look into tokenizers.",
    "ngram": "Train, evaluate, sample and look into n-gram models; ARPA files for KenLM.",
    "deploy": "Make a model folder ready for containers, clusters and functions.",
    "feedback": "What people said of a model's answers: look, decide, export, move.",
    "monitor": "Know when a model is out of its depth, and when its traffic changes.",
}
HELP = (
    "Turn your text, or a published checkpoint, into a small model that gives the same answers on your machine, "
    "a server and a web page."
)
EXAMPLES = ("lmworks build -o demo", "lmworks serve demo")
