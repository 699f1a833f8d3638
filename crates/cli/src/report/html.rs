//! Blocks → one HTML file that fetches nothing, and the same as Markdown.

use super::plot::Plot;

/// A piece of a page.
#[derive(Clone, Debug, PartialEq)]
pub enum Block {
    /// A heading, 1 to 3.
    Heading(u8, String),
    /// A paragraph.
    Text(String),
    /// A list.
    List(Vec<String>),
    /// A table; the first column is text.
    Table(Vec<String>, Vec<Vec<String>>),
    /// A picture.
    Plot(Plot),
}

const STYLE: &str = "\
:root{color-scheme:light dark;--paper:#fff;--ink:#1d2228;--soft:#626b75;--rule:#dfe3e8;\
--s0:#2f6db0;--s1:#c26a1f;--s2:#3f8a5c;--s3:#8a5aa8;--mark:#c0392b}\
@media (prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e4e7ea;--soft:#98a2ad;\
--rule:#2d333a;--s0:#6aa5e0;--s1:#e2975a;--s2:#6fbf8f;--s3:#b78fd0;--mark:#ff7a6b}}\
body{background:var(--paper);color:var(--ink);max-width:84rem;margin:2.5rem auto;padding:0 1.25rem;\
font:15px/1.5 system-ui,-apple-system,\"Segoe UI\",\"DejaVu Sans\",sans-serif}\
h1{font-size:1.7rem;margin:0 0 .3rem}h2{font-size:1.25rem;margin:2.6rem 0 .6rem;\
padding-top:1.1rem;border-top:1px solid var(--rule)}h3{font-size:1rem;margin:1.9rem 0 .5rem}\
p{margin:.5rem 0;max-width:46rem}p,li{color:var(--soft)}ul{padding-left:1.2rem;margin:.4rem 0}\
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.87rem;margin:.5rem 0 1rem;\
font-variant-numeric:tabular-nums}th,td{padding:.22rem .6rem;text-align:right;\
border-bottom:1px solid var(--rule);white-space:nowrap}th{font-weight:600;color:var(--soft)}\
th.text,td.text{text-align:left}th:first-child,td:first-child{padding-left:0}\
figure{margin:.8rem 0 1.4rem}svg{width:100%;max-width:720px;height:auto;display:block}\
svg text{font-size:12px;fill:var(--ink)}svg .head{font-size:13px;font-weight:600}\
svg .tick{fill:var(--soft)}svg .grid{stroke:var(--rule)}svg .mark{stroke:var(--mark);\
stroke-width:2}svg .line{fill:none;stroke-width:2}svg .dot{stroke:none}\
svg rect.s0,svg .dot.s0{fill:var(--s0)}svg .line.s0{stroke:var(--s0)}\
svg rect.s1,svg .dot.s1{fill:var(--s1)}svg .line.s1{stroke:var(--s1)}\
svg rect.s2,svg .dot.s2{fill:var(--s2)}svg .line.s2{stroke:var(--s2)}\
svg rect.s3,svg .dot.s3{fill:var(--s3)}svg .line.s3{stroke:var(--s3)}";

/// The page as HTML.
pub fn html(title: &str, blocks: &[Block]) -> String {
    let body: String = blocks.iter().map(html_block).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <title>{}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n",
        escape(title)
    )
}

fn html_block(block: &Block) -> String {
    match block {
        Block::Heading(level, text) => format!("<h{level}>{}</h{level}>\n", escape(text)),
        Block::Text(text) => format!("<p>{}</p>\n", escape(text)),
        Block::List(items) => {
            let items = items.iter().map(|i| format!("<li>{}</li>\n", escape(i)));
            format!("<ul>\n{}</ul>\n", items.collect::<String>())
        }
        Block::Table(header, rows) => {
            let text = text_columns(header, rows);
            let cells = |tag: &str, cells: &[String]| {
                let cell = |(i, c): (usize, &String)| {
                    let class = if text[i] { " class=\"text\"" } else { "" };
                    format!("<{tag}{class}>{}</{tag}>", escape(c))
                };
                format!("<tr>{}</tr>\n", cells.iter().enumerate().map(cell).collect::<String>())
            };
            let rows: String = rows.iter().map(|r| cells("td", r)).collect();
            let header = cells("th", header);
            format!(
                "<div class=\"wide\"><table>\n<thead>{header}</thead>\n\
                 <tbody>{rows}</tbody>\n</table></div>\n"
            )
        }
        Block::Plot(plot) => format!("<figure>{}</figure>\n", plot.svg()),
    }
}

/// Which columns are text: the first, and those with anything but numbers and dashes.
fn text_columns(header: &[String], rows: &[Vec<String>]) -> Vec<bool> {
    let number = |c: &String| c == "–" || c.starts_with(|f: char| f == '-' || f.is_ascii_digit());
    (0..header.len()).map(|i| i == 0 || !rows.iter().all(|r| number(&r[i]))).collect()
}

/// A table without the columns that have nothing to say.
pub fn filled(header: Vec<String>, rows: Vec<Vec<String>>) -> Block {
    let says: Vec<bool> =
        (0..header.len()).map(|i| i == 0 || rows.iter().any(|r| r[i] != "–")).collect();
    let keep = |cells: Vec<String>| {
        cells.into_iter().zip(&says).filter_map(|(c, &says)| says.then_some(c)).collect()
    };
    Block::Table(keep(header), rows.into_iter().map(keep).collect())
}

/// Text as HTML shows it.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

/// The page as Markdown; pictures are left out, their numbers are in the tables.
pub fn markdown(blocks: &[Block]) -> String {
    let mut out = String::new();
    for block in blocks {
        let text = match block {
            Block::Heading(level, text) => format!("{} {text}", "#".repeat(*level as usize)),
            Block::Text(text) => text.clone(),
            Block::List(items) => {
                items.iter().map(|i| format!("- {i}")).collect::<Vec<_>>().join("\n")
            }
            Block::Table(header, rows) => markdown_table(header, rows),
            Block::Plot(_) => continue,
        };
        if !out.is_empty() {
            out.push('\n');
        }
        out.push_str(&text);
        out.push('\n');
    }
    out
}

fn markdown_table(header: &[String], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(|c| c.replace('|', "\\|")).collect();
        format!("| {} |", cells.join(" | "))
    };
    let align = |text: &bool| if *text { "---" } else { "---:" };
    let rule: Vec<&str> = text_columns(header, rows).iter().map(align).collect();
    let mut lines = vec![line(header), format!("| {} |", rule.join(" | "))];
    lines.extend(rows.iter().map(|r| line(r)));
    lines.join("\n")
}

#[cfg(test)]
pub mod tests {
    use super::super::plot::{Bar, Bars};
    use super::*;

    /// Panics unless every tag is closed in order and nothing is fetched.
    pub fn assert_well_formed(page: &str) {
        let mut open: Vec<&str> = Vec::new();
        for part in page.split('<').skip(1) {
            let (tag, _) = part.split_once('>').expect("every < has its >");
            let name = tag.split([' ', '/']).find(|s| !s.is_empty()).unwrap_or("");
            if let Some(closed) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(closed), "in …{tag}…");
            } else if !tag.ends_with('/') && !tag.starts_with('!') && name != "meta" {
                open.push(name);
            }
        }
        assert!(open.is_empty(), "never closed: {open:?}");
        for fetched in ["http:", "https:", "src=", "href=", "url(", "@import", "<script"] {
            assert!(!page.contains(fetched), "the page has {fetched}");
        }
    }

    #[test]
    fn pages_are_well_formed_whatever_the_text() {
        let bar = Bar { label: "x & \"y\"".into(), value: 3.0, mark: Some(1.0) };
        let bars = Bars { title: "<t>".into(), mark: Some("limit".into()), bars: vec![bar] };
        let blocks = [
            Block::Heading(1, "a < b".into()),
            Block::Text("</p><script>".into()),
            Block::List(vec!["one".into()]),
            Block::Table(vec!["h".into(), "n|m".into()], vec![vec!["<td>".into(), "1".into()]]),
            Block::Plot(Plot::Bars(bars)),
        ];
        let page = html("<title>", &blocks);
        assert_well_formed(&page);
        assert!(page.contains("&lt;/p&gt;&lt;script&gt;"));
        let text = markdown(&blocks);
        assert!(text.starts_with("# a < b\n\n</p>"));
        assert!(text.contains("| h | n\\|m |\n| --- | ---: |\n| <td> | 1 |"));
    }

    #[test]
    fn empty_columns_go_and_text_is_left_aligned() {
        let row = |cells: [&str; 4]| cells.map(String::from).to_vec();
        let rows = vec![row(["1", "–", "H200", "2.5"]), row(["2", "–", "H100", "–"])];
        let Block::Table(header, rows) = filled(row(["n", "gone", "GPU", "ms"]), rows) else {
            panic!("a table stays one")
        };
        assert_eq!((header.len(), rows[1].len()), (3, 3));
        assert_eq!(text_columns(&header, &rows), [true, true, false]);
    }

    #[test]
    #[should_panic(expected = "never closed")]
    fn the_check_sees_an_open_tag() {
        assert_well_formed("<p><b></b>");
    }
}
