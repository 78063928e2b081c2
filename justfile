# What a developer runs; CI (.ci/run) runs the same and more.

# format, lint, test
dev: fmt lint test

fmt:
    cargo fmt

lint:
    cargo fmt --check
    cargo clippy --all-targets --locked -- -D warnings

test:
    cargo test --locked

docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --document-private-items --locked

# the whole story on an embedded S3
demo:
    cargo run --release --locked -- demo

# three replicas behind HAProxy on a real Garage, overwritten while clients download
fleet *ARGS:
    cargo build --release --locked
    python3 scripts/fleet-test.py --pinrange target/release/pinrange {{ARGS}}

# kills, flipped bits, full disks, an origin that breaks down, all from a seed: does anybody get a wrong byte?
chaos *ARGS:
    cargo build --release --locked
    python3 scripts/chaos-test.py --pinrange target/release/pinrange {{ARGS}}

# every parser and the request path, so many seconds each
fuzz SECONDS="60":
    scripts/fuzz.sh {{SECONDS}}

# 5,000 idle and 500 slow clients beside a fast one: memory, admin, latency
flood *ARGS:
    cargo build --release --locked
    python3 scripts/flood-test.py --pinrange target/release/pinrange {{ARGS}}

# starts of a replica that holds a thousand and a million revisions
million *ARGS:
    cargo build --release --locked --example origin --bin pinrange
    python3 scripts/run-bench.py revisions {{ARGS}}

# nginx, Varnish, Traffic Server, aria2c … beside pinrange, half an hour: writes docs/PERFORMANCE.md (--quick: 3 min, does it work?)
bench *ARGS:
    scripts/bench.sh {{ARGS}}

# instructions of a warm request, against the baseline: --check, --update, --top 40
instructions *ARGS:
    cargo build --release --locked --bin pinrange --example origin
    python3 scripts/instructions.py {{ARGS}}
