"""The verbs of models at work: served, deployed, watched, corrected, replaced. See verbs.py."""

from __future__ import annotations

SERVING = {  # verb -> where it lives, what it does, two examples
    "serve": (
        "lmworks.cli.serve:serve",
        "Serve the page of a model folder, POST /v1/completions and GET /health/ready.",
        ("lmworks serve my_model", "lmworks serve my_model --port 9000"),
    ),
    "deploy docker": (
        "lmworks.cli.deploy:docker",
        "Write what an image is built from: torch-free, without rights, on a read-only root.",
        ("lmworks deploy docker my_classifier -o image", "lmworks deploy docker graphs --dtype int8 -o image"),
    ),
    "deploy kubernetes": (
        "lmworks.cli.deploy:kubernetes",
        "Write manifests for a cluster: probes, autoscaling by the queue, budgets, network policy, monitoring.",
        (
            "lmworks deploy kubernetes graphs -o cluster",
            "lmworks deploy kubernetes graphs --image registry/intents:1 --secret intents-keys -o cluster",
        ),
    ),
    "deploy serverless": (
        "lmworks.cli.deploy:serverless",
        "Write a function of an event, for AWS Lambda and what takes its images.",
        ("lmworks deploy serverless graphs -o function", "lmworks deploy serverless graphs --dtype int8 -o function"),
    ),
    "deploy ray": (
        "lmworks.cli.deploy:ray",
        "Write a Ray Serve application: replicas of one processor each, more of them as more is asked.",
        ("lmworks deploy ray graphs -o application", "lmworks deploy ray graphs --replicas 2 --most 20 -o application"),
    ),
    "pack": (
        "lmworks.cli.deploy:pack",
        "Write a bundle for a machine without a network: the model, all wheels, their sums, and a script.",
        ("lmworks pack my_classifier -o bundle", "lmworks pack graphs --machine aarch64 --python 3.13 -o bundle"),
    ),
    "monitor fit": (
        "lmworks.cli.monitor:fit",
        "Teach a model its limits: confidence, what is strange to it, and what traffic it expects.",
        (
            "lmworks monitor fit my_classifier reviews.csv",
            "lmworks monitor fit my_classifier data.json --split train,val --out-of-scope data.json:oos_val",
        ),
    ),
    "monitor check": (
        "lmworks.cli.monitor:check",
        "Ask a server, or its log, whether the traffic has drifted; exit code 1 says that it has.",
        (
            "lmworks monitor check http://127.0.0.1:8000",
            "lmworks monitor check http://127.0.0.1:8000 --data labelled.csv --html report.html",
        ),
    ),
    "feedback list": (
        "lmworks.cli.feedback:list_",
        "Count what people said of a model's answers, and show what waits for a decision.",
        ("lmworks feedback list feedback.db", "lmworks feedback list postgresql://lmworks@db/feedback --json"),
    ),
    "feedback review": (
        "lmworks.cli.feedback:review",
        "Accept or reject feedback by its ids, or one by one on a terminal.",
        (
            "lmworks feedback review feedback.db",
            "lmworks feedback review feedback.db --reject 3f1c09a2b4d5e6f7 --accept all",
        ),
    ),
    "feedback export": (
        "lmworks.cli.feedback:export",
        "Write accepted feedback as labelled examples.",
        (
            "lmworks feedback export feedback.db -o corrected.jsonl",
            "lmworks feedback export feedback.db --model news --all -o corrected.jsonl",
        ),
    ),
    "feedback copy": (
        "lmworks.cli.feedback:copy",
        "Copy a database of feedback to another one; it may be stopped and run again.",
        (
            "lmworks feedback copy feedback.db postgresql://lmworks@db/feedback",
            "lmworks feedback copy postgresql://lmworks@db/feedback feedback.db --json",
        ),
    ),
    "feedback forget": (
        "lmworks.cli.feedback:forget",
        "Delete old answers that nobody spoke of, and decided feedback if asked to.",
        (
            "lmworks feedback forget feedback.db --before 2026-10-31",
            "lmworks feedback forget postgresql://lmworks@db/feedback --before 2026-10-31 --all",
        ),
    ),
    "loadtest": (
        "lmworks.cli.loadtest:loadtest",
        "Load a server with real texts: latencies, throughput, errors, and where it saturates.",
        (
            "lmworks loadtest http://127.0.0.1:8000 --clients 16 --requests 1000",
            "lmworks loadtest http://127.0.0.1:8000 --curve --duration 10 --html report.html",
            "lmworks loadtest original quantized --data reviews.csv --html report.html",
        ),
    ),
    "retrain": (
        "lmworks.cli.retrain:retrain",
        "Train on accepted feedback once traffic has changed for long enough, and compare with what is served.",
        (
            "lmworks retrain http://127.0.0.1:8000 news_weights train.csv --feedback feedback.db "
            "--held-out today.csv -o challengers/better",
            "lmworks retrain drift.jsonl news_weights --feedback feedback.db --held-out today.csv --force "
            "-o challengers/better",
        ),
    ),
    "challenge": (
        "lmworks.cli.retrain:challenge",
        "Let a challenger shadow a served model, take its place, or give it back.",
        (
            "lmworks challenge http://127.0.0.1:8000 better --share 0.2 --admin-key-file admin.txt",
            "lmworks challenge http://127.0.0.1:8000 --switch --admin-key-file admin.txt",
        ),
    ),
}
