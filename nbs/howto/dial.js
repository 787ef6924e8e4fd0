const root = document.currentScript.parentElement, get = c => root.querySelector('.' + c);
const F = get('fallback'), R = get('rollback'), S = get('which');
const colours = {s: 'rgba(66,133,244,.25)', l: 'rgba(255,152,0,.4)', r: 'rgba(233,30,99,.4)', x: 'none'};
const speeds = D.entries.map(e => e.speed), most = Math.ceil(Math.max(...speeds));
const px = v => 34 + 300*v/most, py = a => 8 + 150*(1 - (a - low)/(100 - low));
const low = Math.floor(Math.min(...D.entries.map(e => e.likeness))/10)*10;
function node(tag, attributes, text) {
  const n = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const k in attributes) n.setAttribute(k, attributes[k]);
  if (text !== undefined) n.textContent = text;
  return n;
}
function axes() {
  const p = get('plot');
  for (const a of [low, 100]) p.append(node('text', {x: 0, y: py(a) + 4}, a));
  for (let v = 0; v <= most; v++) p.append(node('text', {x: px(v) - 6, y: 176}, v + '×'));
  p.append(node('text', {x: 40, y: 152}, 'likeness (BLEU) up, predicted speed to the right'));
  p.append(node('path', {d: `M34,8 V158 H${px(most)}`, fill: 'none', stroke: 'currentColor'}));
  for (const e of D.entries)
    p.append(node('circle', {cx: px(e.speed), cy: py(e.likeness), r: 2, opacity: .35}));
  p.append(node('circle', {class: 'dot', r: 6, fill: '#e91e63'}));
}
function word([text, kind]) {
  const n = document.createElement('span');
  n.textContent = text;
  n.style.background = colours[kind];
  if (kind == 'x') { n.style.textDecoration = 'line-through'; n.style.opacity = .6; }
  return n;
}
function show() {
  const f = +F.value, r = +R.value, i = +S.value, e = D.entries[f*D.rollback.length + r];
  const shown = x => x == 'inf' ? '∞' : (+x).toFixed(1), [n, l, s] = e.passes[i];
  get('f').textContent = shown(D.fallback[f]);
  get('r').textContent = shown(D.rollback[r]);
  get('text').replaceChildren(...e.sentences[i].map(word));
  get('counts').textContent = `${n} tokens: ${l} passes of the large model, ${s} of the small one.`;
  const own = e.sentences[i].filter(p => p[1] != 'x').map(p => p[0]).join('').replace('</s>', '').trim();
  get('same').textContent = own == D.large[i] ? 'The large model writes the same.' : 'The large model writes: ' + D.large[i];
  get('all').textContent = `200 paragraphs: likeness ${e.likeness.toFixed(1)}, speed ${e.speed.toFixed(2)}× the large model's`;
  get('dot').setAttribute('cx', px(e.speed));
  get('dot').setAttribute('cy', py(e.likeness));
}
D.sources.forEach((s, i) => S.add(new Option(s, i)));
F.max = D.fallback.length - 1; R.max = D.rollback.length - 1;
const start = /dial=(\d+),(\d+),(\d+)/.exec(location.hash) || [0, 4, 3, 0];
[F.value, R.value, S.value] = start.slice(1);
axes();
for (const x of [F, R, S]) x.addEventListener('input', show);
show();
