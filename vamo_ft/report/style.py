"""The look of the page: light and dark as the reader's system says, and on paper."""

__all__ = ["STYLE"]

STYLE = """
:root{--ink:#24292f;--quiet:#57606a;--page:#fff;--line:#d0d7de;--soft:#f6f8fa;--good:#116329;--bad:#b3131e}
@media(prefers-color-scheme:dark){
:root{--ink:#d0d7de;--quiet:#9aa4af;--page:#0d1117;--line:#30363d;--soft:#161b22;--good:#56d364;--bad:#ff7b72}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:1.5rem}
h1{font-size:1.7rem;margin:.2rem 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .7rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .3rem;overflow-wrap:anywhere}
p{margin:.3rem 0}
.quiet,dt,figcaption{color:var(--quiet)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:.6rem;margin:0}
.facts div{background:var(--soft);border:1px solid var(--line);border-radius:6px;padding:.5rem .7rem}
dt{font-size:.82rem}
dd{margin:0;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.state{font-weight:600}.good{color:var(--good)}.bad{color:var(--bad)}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem}
th,td{text-align:left;padding:.3rem .7rem;border-bottom:1px solid var(--line);vertical-align:top}
thead th{background:var(--soft);font-weight:600}
tbody th{font-weight:600;white-space:nowrap}
td{overflow-wrap:break-word;max-width:34rem}
td.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
figure{margin:1rem 0 1.6rem}
figcaption{font-weight:600;margin-bottom:.3rem}
img{max-width:100%;height:auto;display:block}
code{background:var(--soft);border:1px solid var(--line);border-radius:4px;padding:.1rem .35rem;overflow-wrap:anywhere}
.message{border-left:3px solid var(--bad);padding-left:.7rem;overflow-wrap:anywhere}
details{margin:.5rem 0}summary{cursor:pointer}
ul{margin:.4rem 0;padding-left:1.2rem}li{overflow-wrap:anywhere}
@media print{main{max-width:none;padding:0}figure,.facts div,tr{break-inside:avoid}.wide{overflow:visible}
td.number,tbody th{white-space:normal}}
"""
