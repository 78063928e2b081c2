//! What share of the bytes each eviction policy finds in the cache, on seeded traces (docs/EVICTION.md).
//!
//! `cargo run --release --example eviction -- [--capacity GIB] [--json] [--svg FILE]`
//!
//! The first tenth of each trace warms the cache up and does not count.

mod sim;
mod traces;

use std::error::Error;
use std::fmt::Write as _;

use clap::Parser;

use sim::POLICIES;
use traces::TRACES;

/// Byte-hit ratios of eviction policies on seeded traces.
#[derive(Parser)]
struct Arguments {
    /// Capacity of the cache in GiB.
    #[arg(long, default_value_t = 64)]
    capacity: u64,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Write a plot.
    #[arg(long)]
    svg: Option<std::path::PathBuf>,
}

/// Hit ratio of one policy on one trace.
#[derive(Clone, Copy, Default, serde::Serialize)]
struct Ratio {
    /// Of all bytes.
    all: f64,
    /// Of the bytes that were not read by a scan.
    wanted: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let capacity = arguments.capacity << 30;
    let mut ratios = Vec::new();
    for trace in &TRACES {
        let reads = (trace.make)(capacity);
        let row: Vec<Ratio> = POLICIES
            .iter()
            .map(|(_, make)| {
                let mut cache = make(capacity);
                let mut counts = [[0_u32; 2]; 2];
                for (at, read) in reads.iter().enumerate() {
                    let hit = cache.read(read.name, read.chunk);
                    if at >= reads.len() / 10 {
                        counts[usize::from(read.scan)][usize::from(hit)] += 1;
                    }
                }
                let [wanted, scan] = counts;
                let share = |[miss, hit]: [u32; 2]| f64::from(hit) / f64::from((miss + hit).max(1));
                Ratio {
                    all: share([wanted[0] + scan[0], wanted[1] + scan[1]]),
                    wanted: share(wanted),
                }
            })
            .collect();
        ratios.push(row);
    }
    if let Some(path) = &arguments.svg {
        std::fs::write(path, svg(&ratios))?;
    }
    if arguments.json {
        let rows = TRACES.iter().zip(&ratios).map(|(trace, row)| {
            let row = POLICIES.iter().zip(row);
            let row = row.map(|((policy, _), ratio)| ((*policy).to_owned(), *ratio));
            (
                trace.name.to_owned(),
                row.collect::<std::collections::BTreeMap<_, _>>(),
            )
        });
        let rows: std::collections::BTreeMap<_, _> = rows.collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print!("{}", table(&ratios));
    }
    Ok(())
}

/// As docs/EVICTION.md has it.
fn table(ratios: &[Vec<Ratio>]) -> String {
    let mut text = String::from("| trace |");
    for (policy, _) in POLICIES {
        let _ = write!(text, " {policy} |");
    }
    text.push_str("\n|---|");
    text.push_str(&"--:|".repeat(POLICIES.len()));
    for (trace, row) in TRACES.iter().zip(ratios) {
        let _ = write!(text, "\n| {} |", trace.name);
        for ratio in row {
            let _ = write!(text, " {:.1} %", ratio.all * 100.0);
            if (ratio.wanted - ratio.all).abs() > 0.0005 {
                let _ = write!(text, " ({:.1} %)", ratio.wanted * 100.0);
            }
            text.push_str(" |");
        }
    }
    text.push('\n');
    for trace in &TRACES {
        let _ = write!(text, "\n- {}: {}", trace.name, trace.what);
    }
    text.push('\n');
    text
}

/// One group of bars a trace, one bar a policy.
fn svg(ratios: &[Vec<Ratio>]) -> String {
    const COLOURS: [&str; 5] = ["#bbbbbb", "#888888", "#7fa8d1", "#d9a441", "#1b6e3c"];
    const HEIGHT: f64 = 200.0;
    let mut bars = String::new();
    let mut x = 44.0;
    for (trace, row) in TRACES.iter().zip(ratios) {
        let first = x;
        for (ratio, colour) in row.iter().zip(COLOURS) {
            let height = HEIGHT * ratio.all;
            let _ = write!(
                bars,
                r#"<rect x="{x:.0}" y="{:.1}" width="15" height="{height:.1}" fill="{colour}"/>"#,
                30.0 + HEIGHT - height
            );
            x += 16.0;
        }
        let _ = write!(
            bars,
            r#"<text x="{:.0}" y="248" text-anchor="middle">{}</text>"#,
            f64::midpoint(first, x),
            trace.name
        );
        x += 24.0;
    }
    let width = x;
    let mut legend = String::new();
    let mut at = 44.0;
    for ((policy, _), colour) in POLICIES.iter().zip(COLOURS) {
        let _ = write!(
            legend,
            r#"<rect x="{at:.0}" y="6" width="12" height="12" fill="{colour}"/><text x="{:.0}" y="16">{policy}</text>"#,
            at + 16.0
        );
        at += 60.0 + f64::from(u32::try_from(policy.len()).unwrap_or(0)) * 6.0;
    }
    for percent in [0.0, 25.0, 50.0, 75.0, 100.0] {
        let y = 30.0 + HEIGHT - HEIGHT * percent / 100.0;
        let _ = write!(
            legend,
            r##"<line x1="40" x2="{width:.0}" y1="{y:.0}" y2="{y:.0}" stroke="#dddddd"/><text x="36" y="{:.0}" text-anchor="end">{percent:.0} %</text>"##,
            y + 4.0
        );
    }
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0}" height="260" font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#ffffff"/>{legend}{bars}</svg>"##
    ) + "\n"
}
