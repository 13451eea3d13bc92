"""How the report's page looks and behaves; it stands inside the page, which loads nothing."""

STYLE = """
:root{--ink:#1f2328;--soft:#656d76;--line:#d8dee4;--paper:#fff;--panel:#f6f8fa;--warn:#fff8e1;--warn-line:#c58f00;
--run0:#0b6bcb;--run1:#d1495b;--run2:#2e8b57;--run3:#8a5cc2;--run4:#b8860b;--run5:#17888f}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa2ab;--line:#363b42;--paper:#15181c;--panel:#1d2126;
--warn:#3a2f10;--warn-line:#c58f00;--run0:#58a6ff;--run1:#ff7b8b;--run2:#56c98a;--run3:#b794f4;--run4:#e0b13b;
--run5:#4cc2c9}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;margin:0 auto;max-width:1200px;
padding:32px 24px 96px;color:var(--ink);background:var(--paper)}
h1{font-size:28px;line-height:1.2;margin:0}h2{font-size:20px;margin:44px 0 12px}h3{font-size:15px;margin:0 0 6px}
p{margin:4px 0}.quiet{color:var(--soft)}.small,small{font-size:12.5px}
.strip .key{margin-right:-2px}.key{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:6px}
.warn{background:var(--warn);border-left:4px solid var(--warn-line);padding:10px 14px;margin:12px 0;border-radius:4px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr));gap:12px;margin:20px 0 0}
.card details{margin-top:2px}.card{background:var(--panel);border-radius:8px;padding:12px 14px;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th{font-weight:600;vertical-align:bottom;font-size:13.5px}
th,td{vertical-align:top;padding:6px 14px 6px 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}td:last-child,th:last-child{padding-right:0}
td small{display:block;color:var(--soft);font-size:11.5px;line-height:1.3}
.overall td{padding-right:22px}.overall .about{max-width:300px;white-space:normal}
.overall td.plot{padding-left:12px;vertical-align:middle}
.types td:first-child,.types th:first-child{position:sticky;left:0;background:var(--paper)}
tr.all td{font-weight:600;border-bottom:2px solid var(--soft)}tr.all small{font-weight:400}
.pairs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:28px}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:24px 20px}
figure{margin:0}.plots figcaption{font-weight:600;font-size:13.5px;margin-bottom:2px}
svg{display:block;max-width:100%;height:auto}.grid{stroke:var(--line)}.whisker{stroke-width:2;opacity:.45}
svg text{font-size:11px;fill:var(--soft);stroke:none}.tick{text-anchor:middle}.label{text-anchor:end}
details{margin-top:14px}summary{cursor:pointer}summary:hover{text-decoration:underline}
.controls{position:sticky;top:0;background:var(--paper);padding:10px 0;display:flex;gap:8px 18px;flex-wrap:wrap;
align-items:center;border-bottom:1px solid var(--line);z-index:1}
select{font:inherit;color:inherit;background:var(--panel);border:1px solid var(--line);border-radius:6px;
padding:3px 6px;max-width:100%}.hint{margin-left:auto;font-size:12.5px}
article{padding:18px 0;border-bottom:1px solid var(--line)}article h3{font-size:16px;overflow-wrap:anywhere}
article>p{margin-bottom:10px}.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:14px}
.strip img{display:block;width:100%;height:auto;background:var(--panel);border-radius:4px}.result img{cursor:crosshair}
.strip figcaption{font-size:13px;margin-top:5px;display:flex;flex-wrap:wrap;column-gap:8px;align-items:baseline}
.value{margin-left:auto;color:var(--soft);font-variant-numeric:tabular-nums}
.missing div{aspect-ratio:1;background:var(--panel);border-radius:4px;display:grid;place-items:center;color:var(--soft)}
article .all{margin-top:8px;color:var(--soft)}article table{font-size:13px}
@media(max-width:600px){body{padding:20px 14px 64px}.strip{grid-template-columns:repeat(2,1fr);gap:10px}
.hint{display:none}.controls{position:static}.overall td{padding-right:14px}.overall .about{max-width:120px}
.overall .plot{display:none}}
@media print{.controls,.hint{display:none}article{break-inside:avoid}}
"""

SCRIPT = """
const list=document.getElementById('cases'),by=id=>document.getElementById(id);
const text=v=>{if(v===undefined||v===null)return '–';const a=Math.abs(v);return v.toFixed(a>=10?1:a>1?2:3)};
function show(){
 const [run,name]=by('by').value.split('|'),kind=by('kind').value,group=by('group')?by('group').value:'';
 const up=by('order').value==='up',shown=name||NAMES[0];
 const value=c=>{if(!name)return +c.dataset.place;const s=DATA[c.dataset.place][run],v=s?s[name]:null;
  return v===undefined||v===null?(up?Infinity:-Infinity):v};
 const cases=[...list.children];
 cases.sort((a,b)=>{const d=value(a)-value(b);
  return (d?(up||!name?d:-d):0)||a.dataset.place-b.dataset.place});
 let n=0;
 for(const c of cases){
  const on=(!kind||c.dataset.kind===kind)&&(!group||JSON.parse(c.dataset.groups).includes(group));
  c.hidden=!on;n+=on;
  for(const v of c.querySelectorAll('.value')){const s=DATA[c.dataset.place][v.dataset.run];
   v.textContent=s?shown.replaceAll('_',' ')+' '+text(s[shown]):''}}
 list.append(...cases);by('order').disabled=!name;
 by('count').textContent=n+(n===1?' case':' cases')}
for(const id of ['by','kind','order','group'])if(by(id))by(id).addEventListener('change',show);
list.addEventListener('toggle',e=>{const d=e.target;if(!d.matches('.all')||!d.open||d.children.length>1)return;
 const c=d.closest('article'),table=document.createElement('table');
 const labels=[...c.querySelectorAll('.value')].map(v=>v.previousSibling.textContent);
 const row=(cells,tag)=>{const r=table.insertRow();for(const t of cells){const e=document.createElement(tag);
  e.textContent=t;r.append(e)}};
 row(['',...labels],'th');
 for(const n of NAMES)row([n.replaceAll('_',' '),...DATA[c.dataset.place].map(s=>text(s&&s[n]))],'td');
 d.append(table)},true);
for(const result of list.querySelectorAll('.result img')){
 const source=result.closest('.strip').querySelector('img'),own=result.src;
 if(source===result)continue;
 result.addEventListener('pointerenter',()=>{result.src=source.src});
 for(const end of ['pointerleave','pointercancel'])result.addEventListener(end,()=>{result.src=own})}
show();
"""
