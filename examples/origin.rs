//! An origin for benchmarks: the strict S3 over a directory, as slow as real S3 where told to be.
//!
//! ```text
//! cargo run --release --example origin -- DIRECTORY [FIRST_BYTE_MS [BYTES_PER_SECOND_PER_CONNECTION]]
//! ```
//!
//! Its bucket is called `bench` and takes any credentials. Prints its endpoint; then, for each line it reads, the
//! requests and bytes so far as a line of JSON. A line of two numbers sets first-byte delay and pace anew (0: none). Ends with
//! its standard input.

use std::error::Error;
use std::io::BufRead as _;
use std::num::NonZeroU64;
use std::time::Duration;

use pinrange::strict_s3::{Options, StrictS3};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments
        .next()
        .ok_or("name the directory of the objects")?;
    let s3 = StrictS3::start(Options::directory("bench", directory)).await?;
    set(&s3, &arguments.collect::<Vec<_>>())?;
    println!("{}", s3.endpoint());
    for line in std::io::stdin().lock().lines() {
        let words: Vec<String> = line?.split_whitespace().map(str::to_owned).collect();
        set(&s3, &words)?;
        let stats = s3.stats();
        println!(
            r#"{{"requests":{},"gets":{},"unguarded_gets":{},"bytes":{}}}"#,
            stats.requests, stats.gets, stats.unguarded_gets, stats.body_bytes_sent
        );
    }
    Ok(())
}

fn set(s3: &StrictS3, words: &[String]) -> Result<(), Box<dyn Error>> {
    if let Some(delay) = words.first() {
        s3.set_first_byte_delay(Duration::from_millis(delay.parse()?));
    }
    if let Some(pace) = words.get(1) {
        s3.set_bytes_per_second_per_connection(NonZeroU64::new(pace.parse()?));
    }
    Ok(())
}
