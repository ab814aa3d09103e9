// On a narrow screen a figure's title would be cut and its legend lie over the axis title: plotly places both by the
// height of the drawing. The title becomes text above the figure, the legend goes to the bottom of the whole box, and a
// title longer than its axis is broken.
(() => {
  const plain = html => html.replace(/<br\s*\/?>/g, ' ').replace(/<[^>]*>/g, '');
  const text = title => title && (title.text || (typeof title === 'string' ? title : ''));
  const broken = (text, width) => text.split(' ').reduce(
    (lines, word) => (lines.at(-1)+word).length < width ? [...lines.slice(0, -1), `${lines.at(-1)} ${word}`.trim()] : [...lines, word],
    ['']).join('<br>');
  const fit = div => {
    if (!div._fullLayout || div.dataset.fitted || div.clientWidth >= 560) return;
    div.dataset.fitted = 'yes';
    const {showlegend, legend, annotations} = div._fullLayout, change = {};
    const title = text(div.layout.title);
    if (title) {
      const above = document.createElement('p');
      above.className = 'figure-title';
      above.textContent = plain(title);
      div.parentElement.before(above);
      change['title.text'] = '';
      change['margin.t'] = annotations.length ? 40 : 15;
    }
    if (showlegend && legend && legend.orientation === 'h')
      Object.assign(change, {'legend.yref': 'container', 'legend.y': 0, 'legend.yanchor': 'bottom'});
    for (const name of Object.keys(div._fullLayout).filter(key => /^[xy]axis\d*$/.test(key))) {
      const label = text((div.layout[name] || {}).title);
      if (!label || label.includes('<')) continue;
      change[`${name}.title.text`] = broken(label, div._fullLayout[name]._length/6.5);
      change[`${name}.title.font.size`] = 12;
    }
    Plotly.relayout(div, change);
  };
  const all = () => document.querySelectorAll('.plotly-graph-div').forEach(fit);
  addEventListener('load', all);
  addEventListener('resize', all);
})();
